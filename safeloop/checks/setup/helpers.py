"""Objects that are no modules and keep some: what is inside of them, one level deep."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

_FOREIGN = frozenset(sys.stdlib_module_names) | {"torch"}


def is_helper(value: Any) -> bool:
    """Whether this is an object of a class that is neither Python's nor torch's, and no module."""
    if isinstance(value, nn.Module | Tensor | Optimizer | type | FunctionType | MethodType | ModuleType):
        return False
    return type(value).__module__.partition(".")[0] not in _FOREIGN - {"__main__"}


def held_by(value: Any) -> Mapping[str, Any]:
    """The attributes of a helper object, `__slots__` of a dataclass among them."""
    held = dict(getattr(value, "__dict__", {}))
    if dataclasses.is_dataclass(value):
        held |= {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    return held
