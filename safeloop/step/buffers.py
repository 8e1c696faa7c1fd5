"""Keeps the model's buffers from before a turn, so that a refused batch leaves no trace in running statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class BufferKeeper:
    """Copies of all buffers from before the last turns.

    Running statistics are copied every turn, as torch's batch normalisation writes them without a version bump; other
    buffers only when their version counter says that they were written, so that masks and tables cost nothing.

    Args:
        model: buffers that it makes later are not kept.
        depth: how many turns back a refusal may reach: 1, or 2 where the finite check is read one turn later.
    """

    def __init__(self, model: nn.Module, depth: int) -> None:
        self._buffers = list(model.buffers())
        norms = [module for module in model.modules() if isinstance(module, _NormBase)]
        self._silent = {id(buffer) for module in norms for buffer in module.buffers(recurse=False)}
        self._copies = [[buffer.clone() for buffer in self._buffers] for _ in range(depth)]
        self._versions = [[buffer._version for buffer in self._buffers] for _ in range(depth)]

    def keep(self) -> None:
        """Remember the present values."""
        if not self._buffers:
            return
        self._copies.insert(0, self._copies.pop())
        self._versions.insert(0, self._versions.pop())
        versions = self._versions[0]
        with torch.no_grad():
            for index, buffer in enumerate(self._buffers):
                if id(buffer) in self._silent or buffer._version != versions[index]:
                    self._copies[0][index].copy_(buffer)
                    versions[index] = buffer._version

    def restore(self, turns: int | None = None) -> None:
        """Put the values from before so many turns back, by default the oldest, after a batch was refused."""
        copies = self._copies[-1 if turns is None else turns - 1]
        with torch.no_grad():
            for buffer, copy in zip(self._buffers, copies, strict=True):
                _put_back(buffer, copy)


def _put_back(buffer: Tensor, copy: Tensor) -> None:
    if not torch.equal(buffer, copy):
        buffer.copy_(copy)
