"""What objects and functions of the user's hold: a meter, a memory bank, a list in a closure, a dict of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from safeloop.autograd.sites import is_user_code

_DEPTH = 3
_MOST = 500
"""So many objects are opened, and so many members of one container."""
_CLOSED = frozenset(("torch", "safeloop", "builtins", "numpy", "collections", "functools", "threading", "logging"))
"""Packages whose objects hold nothing of the user's, or are looked into by others."""


def opened(holders: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Values by name, each followed by what the plain objects and the functions in it hold: `meters['loss'].sum`."""
    seen: set[int] = set()
    for name, value in holders:
        yield name, value
        yield from _attributes(name, value, _DEPTH, seen)


def _attributes(name: str, value: Any, depth: int, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if not depth or isinstance(value, Tensor) or len(seen) >= _MOST:
        return
    if isinstance(value, (FunctionType, MethodType)):
        if id(value) not in seen:
            seen.add(id(value))
            for key, held in variables_of(value):
                yield key, held
                yield from _attributes(key, held, depth, seen)  # a function is no level of its own
    elif _is_plain(value):
        if id(value) in seen:
            return
        seen.add(id(value))
        for key, held in list(vars(value).items()):
            yield f"{name}.{key}", held
            yield from _attributes(f"{name}.{key}", held, depth - 1, seen)
    else:
        for place, item in _members(value):
            yield from _attributes(f"{name}{place}", item, depth - 1, seen)


def variables_of(function: FunctionType | MethodType) -> Iterator[tuple[str, Any]]:
    """What a function of the user's uses and does not get as an argument: variables around it, and globals."""
    if isinstance(function, MethodType):
        yield "self", function.__self__
        yield from variables_of(function.__func__)  # type: ignore[arg-type]
        return
    code = function.__code__
    if not is_user_code(code):
        return
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield from ((name, function.__globals__[name]) for name in code.co_names if name in function.__globals__)


def methods_of(thing: object) -> Iterator[tuple[str, FunctionType]]:
    """The functions in the user's classes that an object is of."""
    for kind in type(thing).__mro__:
        for name, method in list(vars(kind).items()):
            if isinstance(method, FunctionType) and is_user_code(method.__code__):
                yield name, method


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
