"""Codes SL1: the config and what it names."""
