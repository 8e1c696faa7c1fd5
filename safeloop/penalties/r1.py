"""R1: the slope of a discriminator at real samples."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from safeloop.penalties import gradients
from safeloop.penalties.base import Penalty


class R1(Penalty):
    """`1/2 mean_i ||g_i||^2` at real samples, with `g_i` the gradient of the score of sample i; the weight is gamma.

    A network of ReLUs has biases that the penalty does not depend on: their gradient from it is zero or none, rightly.

    Cost: with the scores at hand (`self.leaf`) a backward pass, and about twice that when it is differentiated.

    Source: Lars Mescheder et al.: Which Training Methods for GANs do actually Converge? (arXiv 1801.04406, 2018),
    equation 9, with its factor 1/2.
    """

    type: Literal["r1"] = "r1"

    @property
    def formula(self) -> str:
        return "1/2 mean |grad|^2"

    def value(self, field: gradients.Field) -> Tensor:
        return gradients.squares(field.gradient()).mean() / 2
