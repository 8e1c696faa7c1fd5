"""The norms of a list of gradients, in one pass, without a sync."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def each_norm(gradients: Sequence[Tensor], *, uniform: bool = False) -> Tensor:
    """The 2-norm of every gradient: `[len(gradients)]`, on the device of the first.

    `torch.linalg.vector_norm` of the result is the norm of all gradients as if they were one vector: the same
    operations in the same order as `torch.nn.utils.get_total_norm`, hence the same bits. NaN or infinity in any
    gradient makes it non-finite, so that the finite check costs nothing more; a finite gradient above about 1e19
    overflows float32 here as it does there: see `exact_norm` before blaming it.

    Args:
        gradients: at least one tensor, of any shapes.
        uniform: the caller knows that all are dense, on one device and of one dtype; skips looking, which costs more
            than the norms themselves on small models.
    """
    if uniform or are_uniform(gradients):
        return torch.stack(torch._foreach_norm(list(gradients)))
    device = gradients[0].device
    return torch.stack([torch.linalg.vector_norm(values(g)).to(device, torch.float32) for g in gradients])


def exact_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients as one vector, 0-d, in float64, which no finite float32 gradient overflows."""
    each = [torch.linalg.vector_norm(values(gradient), dtype=torch.float64) for gradient in gradients]
    norm: Tensor = torch.linalg.vector_norm(torch.stack([one.to(each[0].device) for one in each]))
    return norm


def values(gradient: Tensor) -> Tensor:
    """The entries that count: those of a sparse gradient coalesced, a dense one as it is."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def are_uniform(tensors: Sequence[Tensor]) -> bool:
    """Whether all are dense, on one device and of one dtype."""
    kinds = {(tensor.device, tensor.dtype, tensor.layout) for tensor in tensors}
    return len(kinds) == 1 and next(iter(kinds))[2] is torch.strided
