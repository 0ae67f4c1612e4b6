"""What every step is made of: the table, change detection, validation, states, scaling, averages, checkpoints."""
