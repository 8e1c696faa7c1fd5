"""Optimizers: their specs, who owns which parameter, and what the step needs of each owner."""
