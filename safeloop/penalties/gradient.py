"""The gradient penalty: the slope of a critic is kept at a target, or below it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from safeloop.component import Float
from safeloop.penalties import gradients
from safeloop.penalties.base import Penalty


class GradientPenalty(Penalty):
    """`mean_i (||g_i|| - target)^2`, with `g_i` the gradient of the values of sample i; WGAN-GP has `target: 1.0`.

    One-sided, only what exceeds the target counts: `mean_i max(||g_i|| - target, 0)^2`. Where `g_i` is zero, the
    derivative of the norm is taken to be 0; with `target: 0` squares are summed and no root is taken.

    Cost: with the values at hand a backward pass, and about twice that when it is differentiated; else a forward more.

    Source: Ishaan Gulrajani et al.: Improved Training of Wasserstein GANs (arXiv 1704.00028, 2017), equation 3; one-
    sided: Henning Petzka et al.: On the Regularization of Wasserstein GANs (arXiv 1709.08894, 2018).
    """

    type: Literal["gradient"] = "gradient"
    target: Float = Field(default=0.0, ge=0)
    """norm that each sample's gradient is pulled to: 1 for WGAN-GP, 0 for smoothness alone"""
    sided: Literal["two", "one"] = "two"
    """two: smaller norms are pulled up too; one: only larger ones are pulled down"""

    @property
    def formula(self) -> str:
        if self.target == 0:
            return "mean |grad|^2"
        apart = f"|grad| - {self.target:g}"
        return f"mean ({apart})^2" if self.sided == "two" else f"mean max({apart}, 0)^2"

    def value(self, field: gradients.Field) -> Tensor:
        gradient = field.gradient()
        if self.target == 0:
            return gradients.squares(gradient).mean()
        apart = gradients.norms(gradient) - self.target
        return (apart if self.sided == "two" else apart.relu()).square().mean()
