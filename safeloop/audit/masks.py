"""Sees gradients before the program writes into them, on the steps that are looked at in depth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from safeloop.audit.journal import Journal
from safeloop.audit.shims import guarded
from safeloop.autograd.tape import unheard
from safeloop.checks.source import where_defined
from safeloop.checks.update.masked import MaskedButMoving
from safeloop.faults import Fault


class MaskWatch:
    """Hooks that lie before those of the program, on parameters that have some or whose `.grad` is written.

    Args:
        optimizers: owner -> its optimizer.
        broken: takes errors of our own.
    """

    def __init__(self, optimizers: Mapping[str, Optimizer], broken: list[Exception]) -> None:
        self._broken = broken
        self._check = MaskedButMoving(optimizers)
        self._handles: dict[str, Any] = {}
        self._written: set[str] = set()
        self._places: dict[str, str] = {}
        """parameter -> where its hook is defined"""

    def before(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """A backward pass is about to run."""
        for name, parameter in parameters.items():
            hook = _hook_of(parameter) if parameter.requires_grad and name not in self._handles else None
            if hook is not None:
                self._places[name] = f"hook {where_defined(hook)}".rstrip()
            if hook is not None or (name in self._written and name not in self._handles):
                self._handles[name] = _first_hook(parameter, self._seer(name))

    def after(self, parameters: Mapping[str, nn.Parameter], journal: Journal | None, where: str) -> list[Fault]:
        """A step is about to run; the journal knows whose gradient a line of the loop has written into."""
        self.close()
        if journal is not None:
            journal.flush()
            self._written.update(n for n, held in journal.state.held.items() if held.is_manual and n in parameters)
        places = {name: f"{self._places[name]}; {where}" if name in self._places else where for name in parameters}
        return list(self._check.stepping(parameters, places))

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def _seer(self, name: str) -> Callable[[Tensor], None]:
        def see(gradient: Tensor) -> None:
            if (handle := self._handles.pop(name, None)) is not None:
                handle.remove()  # once each pass: a hook that stays is one that others see
            with guarded(self._broken), unheard(), torch.no_grad():
                self._check.reached(name, gradient)

        return see


def _hook_of(parameter: nn.Parameter) -> Any:
    """The first hook of the program's on a parameter's gradient; None for none."""
    later = getattr(parameter, "_post_accumulate_grad_hooks", None)
    return next(iter([*(parameter._backward_hooks or {}).values(), *(later or {}).values()]), None)


def _first_hook(parameter: nn.Parameter, hook: Callable[[Tensor], None]) -> Any:
    """Register a hook that runs before those that are there, in whose order torch runs them."""
    handle = parameter.register_hook(hook)  # type: ignore[no-untyped-call]
    hooks: Any = parameter._backward_hooks
    others = [(key, value) for key, value in hooks.items() if key != handle.id]
    for key, _ in others:
        del hooks[key]
    hooks.update(others)
    return handle
