"""Which module is running: a stack of names, kept by hooks on every module of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class ModuleStack:
    """The names of the modules whose forward is running, outermost first."""

    def __init__(self, model: nn.Module | None) -> None:
        self._model = model
        self._names: list[str] = []

    @property
    def path(self) -> str:
        """The name of the innermost; empty outside of any, and in the model itself."""
        return self._names[-1] if self._names else ""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A region in which the stack follows the model; its hooks are gone afterwards."""
        handles: list[Any] = []
        try:
            for name, module in [] if self._model is None else self._model.named_modules():
                if not isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                    handles.append(module.register_forward_pre_hook(self._enter(name), prepend=True))
                    handles.append(module.register_forward_hook(self._leave, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._names.clear()

    def _enter(self, name: str) -> Any:
        def enter(module: nn.Module, args: Any) -> None:
            self._names.append(name)

        return enter

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._names:
            self._names.pop()
