"""First derivatives that are differentiated again: the one place where penalties call `torch.autograd.grad`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_SCALE = 4096.0
"""What an inner backward pass starts from at most: in half precision, 65536 is infinity already."""


class NotReached(Exception):
    """The values do not depend on the point."""


class Vanished(Exception):
    """The gradient does not depend on the point: there is no second derivative, or it is zero everywhere."""


@dataclass(frozen=True, slots=True)
class Field:
    """A function's values at a point, with the graph that leads from one to the other."""

    values: Tensor
    """`[N, ...]`, sample i a function of sample i of the point; 0-d where it is a sum over the samples"""
    at: Tensor
    """`[N, ...]`, requires grad"""
    targets: Tensor | None = None
    """what the gradient should be, for penalties that compare"""
    scale: Tensor | None = None
    """fp16 only: the inner backward pass starts from this and its result is divided by it, so that small gradients do
    not vanish on the way; the penalty itself is unscaled"""

    def gradient(self) -> Tensor:
        """`d(sum of values) / d(at)`, `[N, ...]`, differentiable; float32 or wider.

        As sample i of the values depends on sample i of the point alone, row i is the gradient of sample i.
        """
        return self.pull(torch.ones_like(self.values))

    def pull(self, seeds: Tensor, *, is_last: bool = True) -> Tensor:
        """The vector-Jacobian product `sum_k seeds_k d(values_k) / d(at)`, with the shape of the point.

        Args:
            seeds: of the shape of the values.
            is_last: whether the product is what the penalty is made of, and stays differentiable.
        """
        scale = None if self.scale is None else self.scale.clamp(max=MAX_SCALE)
        start = seeds if scale is None else seeds * scale.to(seeds.dtype)
        (found,) = torch.autograd.grad(
            self.values, self.at, start, create_graph=is_last, retain_graph=True, allow_unused=True
        )
        if found is None:
            raise NotReached
        wide = widened(found)
        return wide if scale is None else wide / scale.to(wide.dtype)


def widened(tensor: Tensor) -> Tensor:
    """At least float32, as sums of squares leave the range of half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def squares(rows: Tensor) -> Tensor:
    """The squared Euclidean norm of each sample, `[N, ...]` to `[N]`: over all features together."""
    return rows.flatten(1).square().sum(1) if rows.dim() > 1 else rows.square()


def dots(one: Tensor, other: Tensor) -> Tensor:
    """The scalar product of each sample's features, `[N, ...]` twice to `[N]`."""
    products = one * other
    return products.flatten(1).sum(1) if products.dim() > 1 else products


def norms(rows: Tensor) -> Tensor:
    """The Euclidean norm of each sample, `[N, ...]` to `[N]`; its derivative at zero is 0, not NaN."""
    lengths: Tensor = torch.linalg.vector_norm(rows.reshape(len(rows), -1), dim=1)
    return lengths


def normalized(rows: Tensor) -> Tensor:
    """`[N, ...]` with rows of norm 1; a zero row stays zero."""
    lengths = norms(rows).clamp(min=torch.finfo(rows.dtype).tiny)
    return rows / lengths.view(-1, *[1] * (rows.dim() - 1))
