"""What stands around a step: schedules, decay, param groups, the learning-rate finder, clipping."""
