"""Double backpropagation: how much a loss changes with its input."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from safeloop.penalties import gradients
from safeloop.penalties.base import Penalty


class InputGradient(Penalty):
    """`1/2 mean_i ||d loss_i / d x_i||^2`: small changes of an input change its loss little.

    Give it the loss of each sample (`reduction="none"`); in a config, `of: loss.NAME` takes the loss of torch apart.

    Source: Harris Drucker and Yann LeCun: Improving Generalization Performance Using Double Backpropagation (IEEE
    Transactions on Neural Networks 3(6), 1992), equation 4, averaged over the batch where they sum.
    """

    type: Literal["input_gradient"] = "input_gradient"

    @property
    def formula(self) -> str:
        return "1/2 mean |grad|^2"

    def value(self, field: gradients.Field) -> Tensor:
        return gradients.squares(field.gradient()).mean() / 2
