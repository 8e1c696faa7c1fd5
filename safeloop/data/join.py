"""One big batch out of several micro-batches."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from safeloop.data.structure import key_path


class CannotJoin(Exception):
    """Batches that do not fit together; the text says where and why."""


def joined(batches: Sequence[Any], path: str = "batch") -> Any:
    """The batches as one: tensors one after the other along dimension 0, containers part by part.

    What is no tensor must be the same in all, or lists, which are put one after the other.

    Raises:
        CannotJoin: structures, shapes or values do not fit together.
    """
    first = batches[0]
    if any(type(batch) is not type(first) for batch in batches):
        raise CannotJoin(f"`{path}` is {_kinds(batches)}")
    if isinstance(first, Tensor):
        return _joined_tensors(batches, path)
    if isinstance(first, MutableMapping):
        return _joined_mappings(batches, path)
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*(_part(batches, name, path) for name in first._fields))
    if isinstance(first, (list, tuple)):
        return _joined_rows(batches, path)
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in dataclasses.fields(first)]
        big = copy.copy(first)
        for name in names:
            object.__setattr__(big, name, _part(batches, name, path))
        return big
    if all(_is_same(batch, first) for batch in batches):
        return first
    raise CannotJoin(f"`{path}` is a {type(first).__name__}, with another value in each micro-batch")


def _joined_tensors(tensors: Sequence[Tensor], path: str) -> Tensor:
    first = tensors[0]
    if first.ndim == 0:
        if all(torch.equal(tensor, first) for tensor in tensors):
            return first
        raise CannotJoin(f"`{path}` is a single number, with another value in each micro-batch")
    try:
        return torch.cat(list(tensors))
    except RuntimeError as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise CannotJoin(f"`{path}` has the shapes {shapes}") from error


def _joined_mappings(batches: Sequence[MutableMapping[Any, Any]], path: str) -> MutableMapping[Any, Any]:
    first = batches[0]
    if any(set(batch) != set(first) for batch in batches):
        raise CannotJoin(f"`{path}` has other keys in some micro-batches")
    big = copy.copy(first)
    for key in first:
        big[key] = joined([batch[key] for batch in batches], path + key_path(key))
    return big


def _joined_rows(batches: Sequence[Any], path: str) -> Any:
    kind = type(batches[0])
    parts = [part for batch in batches for part in batch]
    if kind is list and not any(isinstance(part, (Tensor, list, tuple, MutableMapping)) for part in parts):
        return parts
    if len({len(batch) for batch in batches}) > 1:
        raise CannotJoin(f"`{path}` has {', '.join(str(len(batch)) for batch in batches)} parts")
    return kind(joined(column, f"{path}[{i}]") for i, column in enumerate(zip(*batches, strict=True)))


def _part(batches: Sequence[Any], name: str, path: str) -> Any:
    return joined([getattr(batch, name) for batch in batches], f"{path}.{name}")


def _is_same(value: Any, first: Any) -> bool:
    return value is first or (isinstance(value, (str, bytes, int, float, complex)) and value == first)


def _kinds(batches: Sequence[Any]) -> str:
    return " and ".join(dict.fromkeys(f"a {type(batch).__name__}" for batch in batches))
