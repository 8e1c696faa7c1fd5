"""A stretch of steps that are looked at in depth: the tape with everything that listens to it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable

from torch import nn
from torch.overrides import _get_current_function_mode, _get_current_function_mode_stack, _pop_mode, _push_mode

from safeloop.autograd.tape import Call, Listener, Tape
from safeloop.checks.check import CallCheck
from safeloop.faults import Fault


def build_tape(
    model: nn.Module,
    checks: Iterable[CallCheck],
    handle: Callable[[list[Fault]], None],
    listeners: dict[str, list[Listener]] | None = None,
) -> Tape:
    """A tape over which these checks listen; what they find is handled at once."""
    heard: dict[str, list[Listener]] = {name: list(who) for name, who in (listeners or {}).items()}
    for check in checks:
        for name in check.hears:
            heard.setdefault(name, []).append(_listener(check, handle))
    return Tape(model, heard)


def _listener(check: CallCheck, handle: Callable[[list[Fault]], None]) -> Listener:
    def hear(call: Call) -> None:
        if faults := list(check.hear(call)):
            handle(faults)

    return hear


class OpenTape:
    """A tape that stays on over the iterations of a loop that is not ours, and is taken off between two of them.

    A mode lies on a stack: where the loop has put others above it, they are put back when ours has gone.
    """

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.is_on = False

    def on(self) -> None:
        """Switch on, with an empty tape."""
        self.tape.begin()
        self.tape.is_deaf = False
        if not self.is_on:
            self.tape.__enter__()
            self.is_on = True

    def off(self) -> None:
        """Switch off."""
        if not self.is_on:
            return
        if self.tape not in _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
            self.tape.is_deaf = True  # the stack of another thread
            return
        above = []
        while _get_current_function_mode() is not self.tape:  # type: ignore[no-untyped-call]
            above.append(_pop_mode())  # type: ignore[no-untyped-call]
        self.tape.__exit__(None, None, None)
        self.is_on = False
        for mode in reversed(above):
            _push_mode(mode)  # type: ignore[no-untyped-call]


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile runs a part of the model, or any other function of this process.

    A tape cannot see into what is compiled, and torch.compile would trace the tape with it: graphs break, are compiled
    again, and `fullgraph=True` fails.
    """
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    optimized = getattr(dynamo, "OptimizedModule", ())
    if any(backend is not None for backend in getattr(dynamo, "cached_backends", {}).values()):
        return True
    return any(
        isinstance(module, optimized) or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def tell_broken(broken: list[Exception]) -> None:
    """Warn of errors of our own, which the watched program was not stopped for."""
    if broken:
        text = f"the audit failed in itself {len(broken)} times and has seen less than it should: {broken[0]!r}"
        warnings.warn(text, RuntimeWarning, stacklevel=3)
