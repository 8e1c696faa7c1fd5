"""Data sets of tensors in memory: a batch is one `index_select` per tensor, with no loader between."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from safeloop.data.order import Order


def in_memory(dataset: Any) -> tuple[tuple[Tensor, ...], Tensor | None] | None:
    """The tensors of a TensorDataset, or of a Subset of one with its indices; None for every other data set.

    A subclass that reads its samples in a way of its own is no such data set, nor is one with tensors that
    `index_select` would treat otherwise than indexing and stacking (sparse, quantized, subclasses).
    """
    indices = None
    while type(dataset) is Subset:
        picked = torch.as_tensor(dataset.indices, dtype=torch.int64, device="cpu")
        indices = picked if indices is None else picked[indices]
        dataset = dataset.dataset
    if not isinstance(dataset, TensorDataset) or hasattr(dataset, "__getitems__"):
        return None
    kind = type(dataset)
    if kind.__getitem__ is not TensorDataset.__getitem__ or kind.__len__ is not TensorDataset.__len__:
        return None
    if indices is not None:
        indices = torch.where(indices < 0, indices + len(dataset), indices)
    return (dataset.tensors, indices) if all(map(_is_plain, dataset.tensors)) else None


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_quantized


def tensor_batches(
    tensors: tuple[Tensor, ...], indices: Tensor | None, order: Order, epoch: int
) -> Iterator[list[Tensor]]:
    """The batches of an epoch, each a list of tensors [n, ...] on their own devices: what a DataLoader would collate.

    `indices` are the samples that take part, None for all. A batch never shares memory with the data set.
    """
    chosen = order.indices(epoch) if indices is None else indices[order.indices(epoch)]
    on_device = {tensor.device: chosen.to(tensor.device) for tensor in tensors}
    pairs = [(tensor, on_device[tensor.device]) for tensor in tensors]
    for start, length in order.slices():
        yield [tensor.index_select(0, where.narrow(0, start, length)) for tensor, where in pairs]
