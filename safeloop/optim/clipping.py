"""Gradient clipping: by the norm of all gradients, by value, or adaptively by the norm of each weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field, create_model
from torch import Tensor

from safeloop.autograd.norms import values
from safeloop.component import Component, Float


@dataclass(frozen=True, slots=True)
class ClipByNorm:
    """Scale all gradients of an owner by one factor, so that their norm is at most `limit`."""

    key: ClassVar[str] = "max_norm"
    limit: float


@dataclass(frozen=True, slots=True)
class ClipByValue:
    """Bring each entry of a gradient into `[-limit, limit]`."""

    key: ClassVar[str] = "clip_value"
    limit: float


@dataclass(frozen=True, slots=True)
class ClipAdaptively:
    """Bring the gradient of each unit to at most `limit` times the norm of its weights."""

    key: ClassVar[str] = "agc"
    limit: float
    eps: float
    exempt: frozenset[str] = frozenset()
    """names of the parameters that are left alone"""


Clipping = ClipByNorm | ClipByValue | ClipAdaptively


class AdaptiveFields(Component):
    """Adaptive gradient clipping (Brock et al. 2021): each unit's gradient is limited by the norm of its weights."""

    clip: Float = Field(default=0.01, gt=0)
    """largest allowed ratio of a unit's gradient norm to its weight norm; a unit is an output row"""
    eps: Float = Field(default=1e-3, gt=0)
    """smallest weight norm that counts, so that weights that start at zero can move"""

    @property
    def exempt(self) -> tuple[str, ...]:
        """Patterns over full names of parameters that are left alone."""
        patterns: tuple[str, ...] = getattr(self, "except")
        return patterns


_MEANING = "patterns of parameters that are left alone; the paper leaves out the last linear layer"
_EXCEPT: dict[str, Any] = {"except": (tuple[str, ...], Field((), description=_MEANING))}
if TYPE_CHECKING:
    AdaptiveClipping = AdaptiveFields
else:
    AdaptiveClipping = create_model("AdaptiveClipping", __base__=AdaptiveFields, __module__=__name__, **_EXCEPT)
    AdaptiveClipping.__doc__ = AdaptiveFields.__doc__
"""The section `agc`; made by a call, since `except` is a word of Python that a class body cannot define."""


def clip_by_norm(gradients: Sequence[Tensor], norm: Tensor, limit: float) -> None:
    """Scale gradients in place by `min(1, limit / norm)`: the bits of `torch.nn.utils.clip_grads_with_norm_`.

    Args:
        gradients: of any shapes, dense or coalesced.
        norm: their norm as one vector, 0-d.
        limit: the norm that they may have.
    """
    coefficient = torch.clamp(limit / (norm + 1e-6), max=1.0)
    for alike in _alike(gradients):
        torch._foreach_mul_(alike, coefficient.to(alike[0].device))


def clip_by_value(gradients: Sequence[Tensor], limit: float) -> None:
    """Clamp every entry in place to `[-limit, limit]`: the bits of `torch.nn.utils.clip_grad_value_`."""
    for alike in _alike(gradients):
        torch._foreach_clamp_min_(alike, -limit)
        torch._foreach_clamp_max_(alike, limit)


def largest_entry(gradients: Sequence[Tensor]) -> Tensor:
    """The largest absolute value of all entries, 0-d, on the device of the first gradient."""
    device = gradients[0].device
    each = [norm for alike in _alike(gradients) for norm in torch._foreach_norm(alike, torch.inf)]
    return torch.stack([norm.to(device, torch.float32) for norm in each]).max()


def clip_adaptively(
    gradients: Sequence[Tensor], weights: Sequence[Tensor], limit: float, eps: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Limit the gradient of each unit by the norm of its weights, in place; whether any was limited, 0-d bool.

    With `W` the weights of a unit and `G` their gradient, `G` becomes `G * limit * max(|W|, eps) / |G|` where
    `|G| / max(|W|, eps) > limit`, and stays as it is elsewhere. A unit is a row `W[i]` of a tensor with two or more
    dimensions, and the whole tensor of one with fewer. No sync; costs a pass over gradients and weights.

    Args:
        gradients: of any shapes, dense or coalesced.
        weights: the parameters that they belong to.
        limit: the largest ratio of the two norms.
        eps: the smallest weight norm that counts.
        dtype: in which the norms are computed; float64 where float32 would overflow.

    Source:
        Andrew Brock, Soham De, Samuel L. Smith, Karen Simonyan: High-Performance Large-Scale Image Recognition Without
        Normalization (arXiv 2102.06171, 2021), equation 3. The paper's fully-connected units are columns of its
        matrices and rows of torch's.
    """
    limited: list[Tensor] = []
    for gradient, weight in zip(gradients, weights, strict=True):
        wide = torch.promote_types(gradient.dtype, dtype)
        most = limit * _unit_norms(weight.detach(), wide).clamp(min=eps)
        norms = _unit_norms(gradient, wide)
        coefficient, entries = (most / norms).clamp(max=1.0), values(gradient)
        if coefficient.dim() and gradient.is_sparse:
            coefficient = coefficient[gradient.indices()[0]]
        entries.mul_(coefficient.reshape(-1, *[1] * (entries.dim() - 1)) if coefficient.dim() else coefficient)
        limited.append((norms > most).any())
    device = gradients[0].device
    return torch.stack([one.to(device) for one in limited]).any()


def _unit_norms(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The norm of each row, `[rows]`, or of a tensor with fewer than two dimensions, 0-d."""
    kind = None if tensor.is_complex() else dtype
    if tensor.dim() < 2 or not tensor.is_sparse:
        dim = tuple(range(1, tensor.dim())) or None
        norms: Tensor = torch.linalg.vector_norm(values(tensor), dim=dim, dtype=kind)
        return norms
    rows, entries = tensor.indices()[0], tensor.values()
    squares: Tensor = torch.linalg.vector_norm(entries.reshape(len(rows), -1), dim=1, dtype=kind).square()
    return squares.new_zeros(tensor.shape[0]).index_add_(0, rows, squares).sqrt()


def _alike(gradients: Sequence[Tensor]) -> list[list[Tensor]]:
    """The entries of gradients by device and dtype, as torch's list kernels want them."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        kinds.setdefault((gradient.device, gradient.dtype), []).append(values(gradient))
    return list(kinds.values())
