"""Examples: each is trained by a config of the same name in `configs/`."""
