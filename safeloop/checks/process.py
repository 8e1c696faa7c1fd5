"""What lives in this process beside what the watch was given."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def alive(kind: type) -> list[Any]:
    """Every object of a class in the process.

    Asks the real type alone: a proxy of somebody's may answer `isinstance` with an import or an error.
    """
    things = gc.get_objects()
    kinds = {known for known in set(map(type, things)) if issubclass(known, kind)}
    return [thing for thing in things if type(thing) in kinds] if kinds else []


def held_by_any_optimizer(tensors: Iterable[Tensor]) -> set[int]:
    """The ids of those of these tensors that some optimizer of the process holds. It looks at every object there is."""
    wanted = {id(tensor) for tensor in tensors}
    held: set[int] = set()
    for optimizer in alive(Optimizer):
        with suppress(AttributeError, TypeError, KeyError):
            held |= {id(p) for group in optimizer.param_groups for p in group["params"]} & wanted
    return held
