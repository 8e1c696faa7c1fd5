"""Which births each non-finite tensor descends from, by the storage that holds its values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Births = frozenset[int]
NONE: Births = frozenset()


class Taint:
    """Storage -> indices of births. A view shares its storage's, and so does what autograd saved of a tensor.

    A weak reference keeps the address of each storage from being used again, and lets its values go.
    """

    def __init__(self) -> None:
        self._births: dict[int, Births] = {}
        self._kept: list[Any] = []

    def of(self, tensor: Tensor) -> Births | None:
        """The births that a tensor descends from; None for a storage that is not known to be bad."""
        return self._births.get(key_of(tensor))

    def put(self, tensor: Tensor, births: Births, *, is_write: bool = False) -> None:
        """A tensor is bad and descends from these; an in-place write adds to what its storage had."""
        key = key_of(tensor)
        if key not in self._births:
            self._kept.append(_guard(tensor))
        self._births[key] = births | self._births.get(key, NONE) if is_write else births

    def forget(self, tensor: Tensor) -> None:
        """A write made all of this tensor finite; what its storage holds beyond it stays known."""
        key = key_of(tensor)
        if key in self._births and tensor.numel() * tensor.element_size() >= tensor.untyped_storage().nbytes():
            self._births[key] = NONE


def key_of(tensor: Tensor) -> int:
    """The address of a tensor's storage; of one without, its own. Unique as long as the storage is guarded."""
    storage = _storage(tensor)
    return id(tensor) if storage is None else storage._cdata


def _guard(tensor: Tensor) -> Any:
    storage = _storage(tensor)
    return tensor if storage is None else StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def _storage(tensor: Tensor) -> Any:
    if tensor.layout is torch.sparse_coo:
        tensor = tensor._values()
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # a layout or a subclass that holds its values elsewhere
        return None
