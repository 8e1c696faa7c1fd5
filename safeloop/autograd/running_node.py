"""The node whose backward is running: which of its saved tensors did its own forward write?"""

from __future__ import annotations

from typing import Any

import torch

_WRITTEN_BY_THE_OPERATION = (
    ("BatchNorm", ("running_mean", "running_var")),
    ("RreluWithNoise", ("noise",)),
    ("CudnnRnn", ("dropout_state",)),
)
"""parts of names of nodes, and the arguments that their forward writes after they were saved, without counting it"""
_raw_names: dict[type, tuple[str, ...]] = {}


def running_node() -> Any:
    """The node whose backward runs in this thread; None outside of a backward pass, though torch's stub denies it."""
    return torch._C._current_autograd_node()


def argument_of(packed: object) -> str:
    """What `packed`, the result of a pack hook, is to the running node: `result`, `weight`; empty where it is nothing.

    A tensor in a list of them (`tensors`), and those of a custom function, bear the name of the list.
    """
    node = running_node()
    for name in raw_names(node):
        saved = getattr(node, name)
        for one in saved if isinstance(saved, tuple) else (saved,):
            if getattr(one, "data", None) is packed:
                return name.removeprefix("_raw_saved_")
    return ""


def raw_names(node: Any) -> tuple[str, ...]:
    """The attributes of a node that give its saved tensors as they are held, without unpacking them."""
    kind = type(node)
    if kind not in _raw_names:
        _raw_names[kind] = tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))
    return _raw_names[kind]


def writes_itself() -> bool:
    """Whether the running node is of an operation that writes into some of its arguments, uncounted, once saved."""
    node = running_node()
    return node is not None and any(part in node.name() for part, _ in _WRITTEN_BY_THE_OPERATION)


def is_own_write(argument: str) -> bool:
    """Whether the forward of the running node itself wrote it: what changed then is no news."""
    node = running_node()
    if getattr(node, "_saved_training", True) is False:  # running statistics are then only read
        return False
    return node is not None and any(part in node.name() and argument in own for part, own in _WRITTEN_BY_THE_OPERATION)
