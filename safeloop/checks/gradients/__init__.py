"""Codes SL5: gradient values, before the update."""
