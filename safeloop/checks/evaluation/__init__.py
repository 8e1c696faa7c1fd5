"""Codes SL7: evaluation and metrics."""
