"""Codes SL6: the order of the step, optimizers and schedules."""
