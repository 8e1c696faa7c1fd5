"""Codes SL430 to SL444: penalties, before the backward pass."""
