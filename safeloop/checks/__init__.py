"""Checks: one class per code, in folders by the stage at which the pattern shows. `registry.py` lists them all."""
