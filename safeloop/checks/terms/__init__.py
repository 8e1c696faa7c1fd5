"""Codes SL4: loss terms, before the backward pass."""
