"""The spectral norm of the Jacobian, by power iteration."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from safeloop.component import Int
from safeloop.penalties import gradients
from safeloop.penalties.base import Penalty


class SpectralNorm(Penalty):
    """`1/2 mean_i sigma_i^2`, with `sigma_i` the largest singular value of the Jacobian of sample i.

    From a random start, `v = J^T u / ||J^T u||` and `u = J v / ||J v||` are iterated; then `sigma = u^T J v`, from
    below, whose derivative is that of the singular value, as `u` and `v` are held. `J v` is the derivative of `J^T u`
    with respect to `u`. Of a linear layer, sigma is the spectral norm of its weight at every point: a batch of one
    point is enough.

    The error after t iterations falls with `(sigma_2 / sigma_1)^(4 t)`.

    Cost: two backward passes for each iteration, one more, and about twice that one when it is differentiated.

    Source: Yuichi Yoshida and Takeru Miyato: Spectral Norm Regularization for Improving the Generalizability of Deep
    Learning (arXiv 1705.10941, 2017), algorithm 1, of the Jacobian in place of each weight.
    """

    type: Literal["spectral"] = "spectral"
    iterations: Int = Field(default=8, ge=1)
    """power iterations from a random start"""

    @property
    def formula(self) -> str:
        return f"1/2 mean sigma^2 by {self.iterations} power iterations"

    def value(self, field: gradients.Field) -> Tensor:
        u = gradients.normalized(torch.randn_like(gradients.widened(field.values.detach())))
        probe = torch.zeros_like(field.values).requires_grad_()
        pulled = field.pull(probe)
        for _ in range(self.iterations):
            v = gradients.normalized(field.pull(u.to(field.values.dtype), is_last=False).detach())
            (pushed,) = torch.autograd.grad(pulled, probe, v.to(pulled.dtype), retain_graph=True)
            u = gradients.normalized(gradients.widened(pushed))
        sigmas = gradients.dots(field.pull(u.to(field.values.dtype)), v)
        return sigmas.square().mean() / 2
