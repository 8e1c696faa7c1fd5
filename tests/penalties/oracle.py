"""Every penalty a second time: sample by sample, from full Jacobians and Hessians, in plain loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.autograd.functional import jacobian as full_jacobian

from safeloop.penalties.base import Penalty
from safeloop.penalties.gradients import Field

Function = Callable[[Tensor], Tensor]


class Smooth(nn.Module):
    """Tanh network of `[N, 2, 3]` with several outputs, in float64."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, outputs)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def points(n: int = 4) -> Tensor:
    return torch.randn(n, 2, 3, dtype=torch.float64)


def evaluated(function: Function, x: Tensor, **more: Any) -> Field:
    at = x.detach().requires_grad_()
    return Field(function(at), at, **more)


def value_of(penalty: Penalty, function: Function, x: Tensor, **more: Any) -> Tensor:
    return penalty.value(evaluated(function, x, **more))


def jacobians(function: Function, x: Tensor) -> list[Tensor]:
    """For each sample the Jacobian `[K, features]`, one sample at a time."""
    found = []
    for sample in x:
        one = full_jacobian(lambda s: function(s.unsqueeze(0)).flatten(), sample)
        found.append(one.reshape(one.shape[0], -1))
    return found


def slopes(function: Function, x: Tensor) -> list[Tensor]:
    """For each sample the gradient of the sum of its values, `[features]`."""
    return [matrix.sum(0) for matrix in jacobians(function, x)]


def hessians(function: Function, x: Tensor) -> list[Tensor]:
    """For each sample the Hessian of the sum of its values, `[features, features]`."""
    size = x[0].numel()
    return [hessian(lambda s: function(s.unsqueeze(0)).sum(), sample).reshape(size, size) for sample in x]


def mean(numbers: list[Tensor]) -> Tensor:
    return torch.stack(numbers).mean()


def central_differences(value: Callable[[], Tensor], parameters: list[nn.Parameter], eps: float = 1e-5) -> list[Tensor]:
    """The gradient of a number with respect to every entry of the parameters, by central differences."""
    gradients = []
    for parameter in parameters:
        gradient = torch.zeros_like(parameter)
        flat, out = parameter.detach().view(-1), gradient.view(-1)
        for index in range(flat.numel()):
            before = flat[index].item()
            flat[index] = before + eps
            above = float(value())
            flat[index] = before - eps
            below = float(value())
            flat[index] = before
            out[index] = (above - below) / (2 * eps)
        gradients.append(gradient)
    return gradients


def relative(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Norm of the difference over the norm of what is wanted, over all tensors together."""
    apart = torch.cat([(a - b).flatten() for a, b in zip(found, wanted, strict=True)]).norm()
    return float(apart / torch.cat([b.flatten() for b in wanted]).norm())
