"""Pure functions of tensors and autograd graphs: norms, walks. Nothing here knows a Trainer, a config or a check."""
