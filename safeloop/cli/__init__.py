"""The commands. Torch is imported only inside those that build a model."""
