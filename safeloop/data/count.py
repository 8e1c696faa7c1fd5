"""How many samples a batch holds."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from safeloop.data.structure import tensors


def count(batch: Any) -> int:
    """The leading dimension of the first tensor in a batch, depth first; 1 for a 0-d one and where there is none.

    It weighs 0-d metrics and counts samples per second. Override `count` of the Trainer where a batch says it
    otherwise.
    """
    if type(batch) in (tuple, list) and batch and isinstance(batch[0], Tensor):
        first: Tensor | None = batch[0]
    else:
        first = next((tensor for _, tensor in tensors(batch)), None)
    return 1 if first is None or first.ndim == 0 else int(first.shape[0])
