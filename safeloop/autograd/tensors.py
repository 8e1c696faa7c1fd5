"""What the tape asks of tensors and frames: their nodes, their bases, the tensors in arguments."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

_CHECKPOINT = CheckpointFunction.forward.__code__


def in_checkpoint() -> bool:
    """Whether the forward of a re-entrant checkpoint is running."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code is _CHECKPOINT:
            return True
        frame = frame.f_back
    return False


def reference_to(tensor: Tensor | None) -> Any:
    """A weak reference to a tensor, or to what it is a view of."""
    if tensor is None:
        return lambda: None
    with torch._C.DisableTorchFunction():
        base = tensor._base
    return weakref.ref(tensor if base is None else base)


def node_of(tensor: Tensor) -> Any:
    """The node that made a tensor; None also for a view that torch bars: made under no_grad, its base written to."""
    try:
        return tensor.grad_fn
    except RuntimeError:
        return None


def tensors_of(value: Any, depth: int) -> Iterator[Tensor]:
    """The tensors in arguments or results, `depth` levels of containers deep."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_of(item, depth - 1)
    elif depth and isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item, depth - 1)
