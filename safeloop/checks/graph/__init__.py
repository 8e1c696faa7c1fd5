"""Codes SL3: the autograd graph and writes to what it saved."""
