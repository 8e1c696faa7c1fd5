"""What a batch is made of: its parts, each with its path (`["mask"]`, `[0]`, `.image`), and the tensors in it."""

from __future__ import annotations

import dataclasses
import json
from collections import deque
from collections.abc import Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

_ATOMS = (
    str,
    bytes,
    int,
    float,
    complex,
    type(None),
    type,
    FunctionType,
    ModuleType,
    nn.Module,
    np.ndarray,
    np.generic,
)


def parts(value: Any) -> Iterator[tuple[str, Any]]:
    """The direct parts of a container or object, as (path, part); none of a tensor, a number, a string, a module."""
    if isinstance(value, (Tensor, *_ATOMS)):
        return
    if isinstance(value, Mapping):
        yield from ((key_path(key), part) for key, part in value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from ((f".{name}", part) for name, part in zip(value._fields, value, strict=True))
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        yield from ((f"[{index}]", part) for index, part in enumerate(value))
    elif dataclasses.is_dataclass(value):
        yield from ((f".{f.name}", getattr(value, f.name)) for f in dataclasses.fields(value) if hasattr(value, f.name))
    else:
        yield from ((f".{name}", getattr(value, name)) for name in _attributes(value))


def tensors(value: Any, path: str = "batch") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a batch with its path, depth first. A part that contains itself is visited once."""
    return _tensors(value, path, set())


def key_path(key: Any) -> str:
    """The path of a mapping's part: `["mask"]`, `[3]`."""
    return f"[{json.dumps(key) if isinstance(key, str) else repr(key)}]"


def _tensors(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif id(value) not in seen:
        seen.add(id(value))
        for suffix, part in parts(value):
            yield from _tensors(part, path + suffix, seen)


def _attributes(value: Any) -> list[str]:
    slots = [name for kind in type(value).__mro__ for name in _names(kind.__dict__.get("__slots__", ()))]
    names = dict.fromkeys((*slots, *getattr(value, "__dict__", ())))
    return [name for name in names if not name.startswith("__") and hasattr(value, name)]


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)
