"""Codes SL85: data, device and folders."""
