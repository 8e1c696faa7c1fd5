"""The trace of the Hessian with respect to the input, estimated by random probes."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from safeloop.component import Int
from safeloop.penalties import gradients
from safeloop.penalties.base import Penalty


class HessianTrace(Penalty):
    """`mean_i tr(d^2 f_i / d x_i^2)`, the Laplacian of the values of each sample, without bias; it may be negative.

    With `v` of independent random signs, `v^T H v` has the mean `tr H`; its variance is `2 sum_{j != k} H_jk^2`, so
    that it is exact for a diagonal Hessian.

    A network of ReLUs is linear piece by piece: its Laplacian is exactly zero and trains nothing (SL437). Score
    matching adds this to half the squared gradient norm.

    Cost: a backward pass and one more for each probe; training it takes a third derivative, about twice all that.

    Source: Michael F. Hutchinson: A stochastic estimator of the trace of the influence matrix (Communications in
    Statistics 19(2), 1990); as a loss: Aapo Hyvarinen: Estimation of Non-Normalized Statistical Models by Score
    Matching (JMLR 6, 2005), equation 4.
    """

    order: ClassVar[int] = 3
    type: Literal["hessian_trace"] = "hessian_trace"
    probes: Int = Field(default=1, ge=1)
    """random directions at each point, drawn anew each time"""

    @property
    def formula(self) -> str:
        return f"mean Hessian trace by {self.probes} probe{'s' * (self.probes > 1)}"

    def value(self, field: gradients.Field) -> Tensor:
        gradient = field.gradient()
        if not gradient.requires_grad:
            raise gradients.Vanished
        total = self._probed(gradient, field.at)
        for _ in range(self.probes - 1):
            total = total + self._probed(gradient, field.at)
        return total.mean() / self.probes

    def _probed(self, gradient: Tensor, at: Tensor) -> Tensor:
        signs = torch.randint_like(gradient, 2).mul_(2).sub_(1)
        (product,) = torch.autograd.grad(gradient, at, signs, create_graph=True, retain_graph=True, allow_unused=True)
        if product is None:
            raise gradients.Vanished
        return gradients.dots(gradients.widened(product), signs)
