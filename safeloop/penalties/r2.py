"""R2: the slope of a discriminator at generated samples."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from safeloop.penalties import gradients
from safeloop.penalties.base import Penalty


class R2(Penalty):
    """`1/2 mean_i ||g_i||^2` at generated samples, with `g_i` the gradient of the score of sample i.

    The same number as R1, at other points: give it the generated samples as `at`.

    Source: Lars Mescheder et al.: Which Training Methods for GANs do actually Converge? (arXiv 1801.04406, 2018),
    equation 10, with its factor 1/2.
    """

    type: Literal["r2"] = "r2"

    @property
    def formula(self) -> str:
        return "1/2 mean |grad|^2"

    def value(self, field: gradients.Field) -> Tensor:
        return gradients.squares(field.gradient()).mean() / 2
