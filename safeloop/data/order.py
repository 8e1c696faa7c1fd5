"""The order in which an epoch visits samples: a function of (seed, epoch) and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from safeloop.seeds import derive


@dataclass(frozen=True, slots=True)
class Order:
    """`num_samples` samples in batches of `batch_size`, each once per epoch, but for what `drop_last` leaves out."""

    num_samples: int
    batch_size: int
    seed: int
    shuffle: bool
    drop_last: bool

    @property
    def num_batches(self) -> int:
        """Batches in an epoch."""
        return self.num_samples // self.batch_size if self.drop_last else -(-self.num_samples // self.batch_size)

    @property
    def num_visited(self) -> int:
        """Samples in an epoch."""
        return self.num_batches * self.batch_size if self.drop_last else self.num_samples

    def indices(self, epoch: int) -> Tensor:
        """The samples of an epoch in their order, int64 [num_samples]. The global random state is not touched."""
        if not self.shuffle:
            return torch.arange(self.num_samples, device="cpu")
        generator = torch.Generator().manual_seed(derive(self.seed, "order", epoch))
        return torch.randperm(self.num_samples, generator=generator, device="cpu")

    def slices(self) -> Iterator[tuple[int, int]]:
        """(start, length) of each batch within `indices`."""
        for start in range(0, self.num_visited, self.batch_size):
            yield start, min(self.batch_size, self.num_visited - start)

    def __str__(self) -> str:
        order = "shuffled by (seed, epoch)" if self.shuffle else "in order"
        return f"{self.num_samples} samples, {self.num_batches} batches of {self.batch_size}, {order}"
