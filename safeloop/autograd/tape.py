"""A tape of the calls of torch functions that the user's code makes, and of whose values each tensor holds.

While it is on, every tensor carries two facts: which parameters reach it *with* a gradient path (`live`), and which
marks its value has met on the way (`marks`): the places where a path was cut, and others that checks want to follow.
Nothing is changed: no number, no random state. Tensors are known by weak references, so that none lives longer.
Cost: about 10 us for each call; it is on for the steps that are looked at in depth, never for others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn, overrides
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from safeloop.autograd.lineage import Lineage
from safeloop.autograd.numbers import renumbered
from safeloop.autograd.opnames import ASKS, SHAPES_ONLY, name_of, writes_to
from safeloop.autograd.sites import Site, site_of, user_frame
from safeloop.autograd.tensors import tensors_of
from safeloop.autograd.writes import WriteLog
from safeloop.faults import FaultError


@dataclass(slots=True)
class Call:
    """One call, while it is heard: the frames of the user's code are still there."""

    tape: Tape
    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out: Any
    frame: FrameType | None
    """the innermost frame of the user's code"""
    tensors: Sequence[Tensor] = ()
    """the tensors among the arguments"""
    caller: FrameType | None = None
    """the frame that called the function: the user's own, or one of torch's"""
    grad_mode: bool = True
    """whether grad mode was on"""

    @property
    def site(self) -> Site | None:
        """The user's line."""
        return None if self.frame is None else site_of(self.frame)

    @property
    def is_direct(self) -> bool:
        """Whether the user's own line called the function, not torch on its behalf."""
        return self.caller is not None and self.caller is self.frame


Listener = Callable[[Call], None]
Witness = Callable[[Any, Call], None]


class Tape(Lineage, TorchFunctionMode):
    """Records what torch functions are called with and what follows from what.

    Args:
        model: its parameters are followed by name.
        listeners: function name -> who hears each call of it, after it has run. `backward` is heard before.
    """

    def __init__(self, model: nn.Module, listeners: Mapping[str, Sequence[Listener]] | None = None) -> None:
        Lineage.__init__(self, model)
        TorchFunctionMode.__init__(self)
        self.writes = WriteLog()
        """what wrote into which memory"""
        self.broken: list[Exception] = []
        """errors of listeners, which are our own bugs"""
        self.is_deaf = False
        """whether calls pass unheard"""
        self.witness: Witness | None = None
        """who is shown every function and its call, whose `frame` is not looked up"""
        self.functions: dict[type, tuple[Any, ...]] = {}
        """classes of `torch.autograd.Function` -> the arguments of their first call, until somebody takes them"""
        self._listeners = dict(listeners or {})
        self._hooks: list[Any] = []

    def begin(self) -> None:
        """Forget what was recorded, and take stock of the model."""
        super().begin()
        self.functions.clear()
        self.writes.clear()

    def __enter__(self) -> Tape:
        self._hooks = [
            register_module_forward_pre_hook(self._entered),
            register_module_forward_hook(self._left, always_call=True),
        ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._running.clear()
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the call, then note it."""
        kwargs = kwargs or {}
        name = name_of(func)
        if self.is_deaf or name in ASKS:
            if name in _SHOWS:
                self.shown(tensors_of(args, 1))
            return func(*args, **kwargs)
        tensors = list(tensors_of((args, kwargs) if kwargs else args, 3))
        listeners = self._listeners.get(name, ())
        if name == "backward":
            self._tell(listeners, Call(self, name, args, kwargs, None, user_frame(2), tensors))
            if self.witness is not None:
                self._show(self.witness, func, Call(self, name, args, kwargs, None, None, tensors))
            return self._passed(func, args, kwargs, tensors)
        if not torch.is_grad_enabled():
            self._note_function(sys._getframe(1))
        out = self._passed(func, args, kwargs, tensors) if name == "grad" else func(*args, **kwargs)
        frame = None
        try:
            if name not in _OF_GRADIENTS and name not in SHAPES_ONLY:
                frame = self._follow(name, tensors, out)
            if tensors and writes_to(name):
                frame = frame or user_frame(2)
                self.writes.note(tensors[0], name, None if frame is None else site_of(frame))
        except Exception as error:  # our bug must not stop the program that is watched
            self.broken.append(error)
        if self.witness is not None:
            self._show(self.witness, func, Call(self, name, args, kwargs, out, frame, tensors))
        if listeners:
            self._tell(
                listeners,
                Call(self, name, args, kwargs, out, frame or user_frame(2), tensors, _calling(sys._getframe(1))),
            )
        return out

    def _passed(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], tensors: list[Tensor]) -> Any:
        """Run a backward pass, of which a graph may be left: in the gradients that it gives or puts into leaves."""
        with renumbered(tensors) as made:
            out = func(*args, **kwargs)
            made += tensors_of(out, 1) if out is not None else [g for p in self.parameters if (g := p.grad) is not None]
        return out

    def wrote(self, tensors: Iterable[Tensor]) -> None:
        """Something that was not heard, such as the step of an optimizer, has written into these."""
        frame = user_frame(2)
        if frame is not None:
            site = site_of(frame)
            for tensor in tensors:
                self.writes.note(tensor, "step", site)

    def _note_function(self, caller: FrameType) -> None:
        """Keep the arguments of a `torch.autograd.Function` of the user's, whose forward runs with grad mode off."""
        above: FrameType | None = caller
        for _ in range(_DEEP):
            above = None if above is None else above.f_back
            if above is not None and above.f_code is _APPLY:
                kind = above.f_locals.get("cls")
                if isinstance(kind, type) and kind not in self.functions:
                    self.functions[kind] = tuple(above.f_locals.get("args", ()))
                return

    def _tell(self, listeners: Sequence[Listener], call: Call) -> None:
        call.grad_mode = torch.is_grad_enabled()
        with unheard(), torch.no_grad():
            for hear in listeners:
                try:
                    hear(call)
                except (FaultError, KeyboardInterrupt):
                    raise
                except Exception as error:
                    self.broken.append(error)

    def _show(self, witness: Witness, func: Any, call: Call) -> None:
        call.grad_mode = torch.is_grad_enabled()
        with unheard(), torch.no_grad():
            try:
                witness(func, call)
            except (FaultError, KeyboardInterrupt):
                raise
            except Exception as error:
                self.broken.append(error)


_OF_GRADIENTS = frozenset((".grad", ".grad=", "requires_grad_", "retain_grad"))
"""Calls with a parameter that do not use its value, such as those of `zero_grad`."""
_SHOWS = frozenset(("__format__", "__repr__"))
_DEEP = 6
"""Frames above a call in which the forward of a custom function is looked for: wrappers of torch's, helpers."""
_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]


def _calling(frame: FrameType) -> FrameType | None:
    """The frame that called a function; one that is written in Python lies between, with torch's dispatch below it."""
    if frame.f_code.co_filename == overrides.__file__ and frame.f_back is not None:
        return frame.f_back.f_back
    return frame


def unheard() -> Any:
    """A context in which no tape hears what is called: for the audit's own looks at tensors."""
    return torch._C.DisableTorchFunction()
