"""Train mode, entered as a loop of the user's own would."""

from __future__ import annotations

from torch import nn


def enter_training(model: nn.Module) -> None:
    """Put a model into train mode by its own `train`.

    A fresh model says that it trains before anybody has called `train`, which a class may override to keep a frozen
    part in eval mode. Parts that were put into eval mode before stay so.
    """
    if not model.training:
        model.train()
        return
    for module in model.modules():
        if type(module).train is not nn.Module.train and all(part.training for part in module.modules()):
            module.train()
