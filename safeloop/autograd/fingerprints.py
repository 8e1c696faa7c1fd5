"""Fingerprint a tensor's bits without a host sync: has any value changed since, by whatever way it was written?"""

from __future__ import annotations

from functools import cache, lru_cache

import torch
from torch import Tensor

_SHORT = 4096
"""lanes of 8 bytes, or half of their units, that are weighed one by one; longer ones are folded first"""
_WIDTH = 127
"""odd, and prime: a pattern of the data that repeats does not fall into step with the rows"""
_UNITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_SPARSE_COMPRESSED = frozenset({torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc})


def fingerprint(tensor: Tensor) -> Tensor | None:
    """A checksum of a tensor's bits: 0-d int64 on its device; None for what cannot be fingerprinted.

    Up to 8192 units `x` of at most 4 bytes: `sum_i w_i x_i` (mod 2^64), with fixed random odd weights `w`. More: lanes
    `v` of 8 bytes, laid out in rows of 127, become their row sums, their column sums and what is left over, again and
    again until they are short. All is integer arithmetic, so that the result does not depend on the order of
    summation, and NaN, infinity and -0.0 count by their bits.

    Equal bits in the same shape give an equal checksum, always. Different bits give a different one but for odds of
    about 2^-32; a change of one unit in a short tensor is never missed. It is no defence against someone who
    looks for a collision. Only tensors of the same shape, strides and dtype are worth comparing.

    Cost: two passes over dense memory and about 15 small operations; a copy first where the memory has holes.

    Args:
        tensor: of any device and dtype; strided (with any strides, expanded, empty), COO, CSR, CSC, BSR or BSC. None is
            returned for tensor subclasses other than parameters and buffers, for nested, quantized, meta, functorch's
            wrapped and MKLDNN tensors, and for dtypes of less than a byte.
    """
    if not is_plain(tensor):
        return None
    tensor = tensor.detach()
    try:
        if tensor.layout == torch.strided:
            return _strided(tensor)
        return _fold(torch.stack([_strided(part) for part in _parts(tensor)]))
    except (RuntimeError, NotImplementedError):  # a view or sum that torch lacks for it, or no memory for the copy
        return None


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor's own memory holds its values: no subclass, wrapper or layout that keeps them elsewhere."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter, torch.nn.Buffer)
        and not tensor.is_nested
        and not tensor.is_quantized
        and not tensor.is_meta
        and tensor.layout != torch._mkldnn  # type: ignore[attr-defined]
        and tensor.itemsize > 0
        and tensor.dtype not in _SUBBYTE
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


_SUBBYTE = frozenset(
    getattr(torch, name)
    for name in (
        *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)),
        *("bits1x8", "bits2x4", "bits4x2", "float4_e2m1fn_x2"),
    )
    if hasattr(torch, name)
)


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in _SPARSE_COMPRESSED:
        by_row = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
        outer = tensor.crow_indices() if by_row else tensor.ccol_indices()
        return outer, tensor.col_indices() if by_row else tensor.row_indices(), tensor.values()
    raise NotImplementedError(tensor.layout)


def _strided(tensor: Tensor) -> Tensor:
    flat = _flat(tensor)
    size = flat.element_size()
    units = flat.view(_UNITS[min(size, 4)])
    if units.numel() <= 2 * _SHORT:
        return _dot(units.to(torch.int64), _weights(tensor.device, units.numel()))
    if flat.data_ptr() % 8 or flat.storage_offset() * size % 8:
        flat = flat.clone()
    whole = flat.numel() - flat.numel() % (8 // min(size, 8))
    folded = _fold(flat[:whole].view(torch.int64))
    if whole == flat.numel():
        return folded
    left = units[whole:].to(torch.int64)
    return folded + _dot(left, _all_weights(tensor.device)[-left.numel() :])


def _flat(tensor: Tensor) -> Tensor:
    """Every value in a row, of memory in the order in which it lies there; without a copy where that is dense."""
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    if tensor.numel() == 1:
        return tensor.as_strided((1,), (1,))
    if tensor.is_contiguous():
        return tensor.view(-1)
    strides = tensor.stride()
    for dim, stride in enumerate(strides):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
    flat = tensor.permute(order).contiguous().view(-1)
    return flat if flat.numel() != 1 else flat.as_strided((1,), (1,))


def _fold(lanes: Tensor) -> Tensor:
    while lanes.numel() > _SHORT:
        whole = lanes.numel() - lanes.numel() % _WIDTH
        grid = lanes[:whole].view(-1, _WIDTH)
        lanes = torch.cat([grid.sum(1), grid.sum(0), lanes[whole:]])
    # halves, since an even number of sign bits at the top of whole lanes cancels whatever the (odd) weights
    halves = lanes.view(torch.int32).to(torch.int64)
    return _dot(halves, _weights(lanes.device, halves.numel()))


def _dot(lanes: Tensor, weights: Tensor) -> Tensor:
    if lanes.is_cpu:
        return torch.dot(lanes, weights)
    return (lanes * weights).sum()  # no dot of integers on accelerators


@cache
def _all_weights(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    drawn = torch.randint(-(2**62), 2**62, (2 * _SHORT + 8,), generator=generator, dtype=torch.int64, device="cpu")
    return (drawn * 2 + 1).to(device)


@lru_cache(maxsize=512)
def _weights(device: torch.device, count: int) -> Tensor:
    return _all_weights(device)[:count]


_all_weights(torch.device("cpu"))  # now, while no mode is on that would make something else of it
