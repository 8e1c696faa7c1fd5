"""The single numbers with a gradient path that a program makes, such as the terms of a loss, and their fate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from safeloop.autograd.sites import Site


@dataclass(frozen=True, slots=True)
class Scalar:
    """One number with a gradient path to parameters."""

    node: int
    site: Site
    """the user's line that made it"""
    _state: Any
    """what a lineage knows of it"""

    @property
    def is_used(self) -> bool:
        """Whether a later call was given it, that of a backward pass not counted."""
        return bool(self._state.is_used)

    @property
    def marks(self) -> int:
        """The marks that its value has met, as bits."""
        return int(self._state.marks)

    @property
    def is_alive(self) -> bool:
        """Whether somebody still holds it."""
        return self._state.keeper() is not None


def is_followed() -> bool:
    """Whether what is made now can be differentiated by a backward pass that is heard: no transform of `torch.func`."""
    return torch.is_grad_enabled() and torch._C._functorch.peek_interpreter_stack() is None
