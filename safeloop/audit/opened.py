"""What objects of the user's hold: a meter, a memory bank, a replay buffer, also in lists and dicts."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

from torch import Tensor, nn

_DEPTH = 3
_MOST = 500
"""So many objects are opened, and so many members of one container."""
_CLOSED = frozenset(("torch", "safeloop", "builtins", "numpy", "collections", "functools", "threading", "logging"))
"""Packages whose objects hold nothing of the user's, or are looked into by others."""


def opened(holders: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Values by name, each followed by the attributes of the plain objects in it: `meters['loss'].sum`."""
    seen: set[int] = set()
    for name, value in holders:
        yield name, value
        yield from _attributes(name, value, _DEPTH, seen)


def _attributes(name: str, value: Any, depth: int, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if not depth or isinstance(value, Tensor) or len(seen) >= _MOST:
        return
    if _is_plain(value):
        if id(value) in seen:
            return
        seen.add(id(value))
        for key, held in list(vars(value).items()):
            yield f"{name}.{key}", held
            yield from _attributes(f"{name}.{key}", held, depth - 1, seen)
    else:
        for place, item in _members(value):
            yield from _attributes(f"{name}{place}", item, depth - 1, seen)


def _members(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", item) for key, item in list(value.items())[:_MOST])
    elif isinstance(value, (list, tuple, deque)):
        yield from ((f"[{index}]", item) for index, item in enumerate(list(value)[:_MOST]))


def _is_plain(value: Any) -> bool:
    """Whether a value is an object whose attributes are its own: no class, module or function."""
    if isinstance(value, (type, ModuleType, nn.Module)) or not isinstance(getattr(value, "__dict__", None), dict):
        return False
    return type(value).__module__.partition(".")[0] not in _CLOSED
