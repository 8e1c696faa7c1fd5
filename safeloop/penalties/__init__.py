"""Gradient penalties: a component a file, their union, and what a Trainer asks for by `self.penalty`."""
