"""Sharpness-aware minimisation on the digits, as a step by hand under the rules of a plan. See `configs/sam.yaml`.

Run it with `safeloop train configs/sam.yaml`; `safeloop plan configs/sam.yaml` shows the operations of a step.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

import safeloop as sl
from safeloop.step.custom import Operations


class Sam(sl.Trainer):
    """SGD along the gradient where the loss is worst nearby: Foret et al. (2021), algorithm 1.

    The update is all or nothing: a non-finite gradient at either point ends in a fault, with the weights of before.
    The model has no dropout or batch normalisation: both passes must see one and the same function.
    """

    radius = 0.05

    def fit_term(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Cross entropy of the labels."""
        images, labels = batch
        return {"classify": F.cross_entropy(self.model(images), labels)}

    def custom_step(self, ops: Operations, batch: tuple[Tensor, Tensor]) -> None:
        """Up to the worst point within the radius, the gradient there, and the update from where it started."""
        ops.zero()
        ops.backward(self.fit_term(batch))
        with sl.autograd.displaced(list(self.model.parameters()), self.radius):
            ops.zero()
            ops.backward(self.fit_term(batch))
        ops.update()

    def metrics(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Whether each label is right."""
        images, labels = batch
        return {"accuracy": self.model(images).argmax(1) == labels}
