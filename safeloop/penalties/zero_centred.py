"""The zero-centred gradient penalty, between real and generated samples."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from safeloop.penalties import gradients
from safeloop.penalties.base import Penalty


class ZeroCentred(Penalty):
    """`1/2 mean_i ||g_i||^2` at points between real and generated samples: `at=sl.interpolate(real, fake)`.

    R1 and R2 hold the slope at the ends of these lines, this one in between.

    Source: Kevin Roth et al.: Stabilizing Training of GANs through Regularization (arXiv 1705.09367, 2017), without its
    weighting by the discriminator's output, as in Lars Mescheder et al. (arXiv 1801.04406, 2018), with the factor 1/2
    of their R1; Hoang Thanh-Tung et al.: Improving Generalization and Stability of GANs (arXiv 1902.03984, 2019),
    whose lambda is half our weight.
    """

    type: Literal["zero_centred"] = "zero_centred"

    @property
    def formula(self) -> str:
        return "1/2 mean |grad|^2"

    def value(self, field: gradients.Field) -> Tensor:
        return gradients.squares(field.gradient()).mean() / 2
