"""Batches as JSON beside their tensors: dicts, lists, tuples, numbers, strings, None, nested as they come."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from safeloop.data.structure import key_path

MAX_DEPTH = 50
_WORDS: dict[str, float] = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class NotStorable(Exception):
    """A part of a batch that has no place in a bundle; the text says which and why."""


def pack(value: Any, tensors: dict[str, Tensor], prefix: str, path: str = "batch", depth: int = 0) -> Any:
    """`value` as plain JSON; its tensors go into `tensors`, under `prefix/number`.

    Raises:
        NotStorable: it holds an object that is none of the kinds above.
    """
    if depth > MAX_DEPTH:
        raise NotStorable(f"`{path}` is nested more than {MAX_DEPTH} deep")
    if isinstance(value, Tensor):
        return _packed_tensor(value, tensors, prefix, path)
    if value is None or type(value) in (bool, int, str):
        return {"value": value}
    if type(value) is float:
        return {"value": value} if math.isfinite(value) else {"float": str(value)}
    if type(value) in (list, tuple):
        parts = [pack(part, tensors, prefix, f"{path}[{i}]", depth + 1) for i, part in enumerate(value)]
        return {type(value).__name__: parts}
    if type(value) is dict and all(type(key) in (str, int) for key in value):
        return {"dict": [[k, pack(v, tensors, prefix, path + key_path(k), depth + 1)] for k, v in value.items()]}
    raise NotStorable(f"`{path}` is a `{type(value).__module__}.{type(value).__qualname__}`")


def unpack(packed: Any, tensors: Mapping[str, Tensor], depth: int = 0) -> Any:
    """What `pack` was given. Raises ValueError, KeyError or TypeError on anything that it did not write."""
    if depth > MAX_DEPTH or not isinstance(packed, dict) or len(packed) != 1:
        raise ValueError("no batch as a bundle writes it")
    ((kind, value),) = packed.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "value" and isinstance(value, (bool, int, float, str, type(None))):
        return value
    if kind == "float":
        return _WORDS[value]
    if kind in ("list", "tuple") and isinstance(value, list):
        parts = [unpack(part, tensors, depth + 1) for part in value]
        return parts if kind == "list" else tuple(parts)
    if kind == "dict" and isinstance(value, list):
        return {key: unpack(part, tensors, depth + 1) for key, part in value}
    raise ValueError(f"no kind of part: {kind}")


def _packed_tensor(tensor: Tensor, tensors: dict[str, Tensor], prefix: str, path: str) -> dict[str, str]:
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        raise NotStorable(f"`{path}` is a {type(tensor).__name__} of layout {tensor.layout}")
    name = f"{prefix}/{len(tensors)}"
    tensors[name] = stored(tensor)
    return {"tensor": name}


def stored(tensor: Tensor) -> Tensor:
    """A copy that safetensors can write: dense, on the CPU, sharing nothing."""
    return tensor.detach().to("cpu", copy=True).contiguous()
