"""Reads a tensor's values: whether it is finite, and its range in a few numbers. Each call waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from safeloop.nonfinite.birth import Kind, Reading


def kind_of(tensor: Tensor) -> Kind | None:
    """`nan` where one entry is NaN, `inf` where one is infinite and none NaN, None where all are finite."""
    values = _values(tensor)
    if values is None or bool(values.isfinite().all()):
        return None
    return "nan" if bool(values.isnan().any()) else "inf"


def read(tensor: Tensor, name: str = "") -> Reading:
    """The reading of a tensor; of one that cannot be read (integers, foreign layouts), its shape alone."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    values = _values(tensor)
    if values is None or not values.numel():
        return Reading(name, tuple(tensor.shape), dtype, 0.0, 0.0, 0, 0, 0, 0)
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    values = values.detach()
    finite = values[values.isfinite()].double()
    infinite = values.isinf()
    low, high = (float(finite.min()) + 0.0, float(finite.max()) + 0.0) if finite.numel() else (0.0, 0.0)
    return Reading(
        name,
        tuple(tensor.shape),
        dtype,
        low,
        high,
        int((finite == 0).sum()),
        int(values.isnan().sum()),
        int(infinite.sum()),
        int((infinite & (values < 0)).sum()),
    )


def count_bad(tensor: Tensor) -> tuple[int, int]:
    """Entries that are not finite, and all of them."""
    values = _values(tensor)
    return (0, 0) if values is None else (int(values.isfinite().logical_not().sum()), values.numel())


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors among arguments or results, in lists, tuples and dicts too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)


def _values(tensor: Tensor) -> Tensor | None:
    """What can be asked whether it is finite; None where nothing can."""
    if not (tensor.dtype.is_floating_point or tensor.dtype.is_complex) or tensor.is_meta:
        return None
    if tensor.layout is torch.sparse_coo:
        return tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
        return tensor.values()
    if tensor.layout is not torch.strided or tensor.is_nested:
        return None
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor  # float8 knows no isfinite
