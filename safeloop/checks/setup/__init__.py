"""Codes SL2: parameters, owners and modules, before the first step."""
