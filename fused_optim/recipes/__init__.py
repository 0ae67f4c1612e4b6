"""Training recipes that use the optimizers: schedules, param groups, the learning-rate finder, gradient clipping."""
