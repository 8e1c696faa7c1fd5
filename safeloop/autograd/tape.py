"""A tape of the calls of torch functions that the user's code makes, and of whose values each tensor holds.

While it is on, every tensor carries two facts: which parameters reach it *with* a gradient path (`live`), and which
marks its value has met on the way (`marks`): the places where a path was cut, and others that checks want to follow.
Nothing is changed: no number, no random state. Tensors are known by weak references, so that none lives longer.
Cost: about 10 us for each call; it is on for the steps that are looked at in depth, never for others.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn, overrides
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from safeloop.autograd.opnames import ASKS, ESCAPES, SHAPES_ONLY, cut_reason, name_of, writes_to
from safeloop.autograd.sites import Site, site_of, sites_above, user_frame
from safeloop.autograd.writes import WriteLog
from safeloop.faults import FaultError


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened to a value, and that follows it through everything computed from it."""

    kind: str
    """`cut`: a gradient path ended here; other kinds are those of checks"""
    name: str
    """the function that was called"""
    reason: str
    site: Site | None
    module: str
    """the innermost module that was running; empty for none"""
    live: int
    """parameters that the value had a path to, as bits"""
    node: int | None = None
    """the sequence number of the node that had made the value; None for a leaf"""
    is_difference: bool = False
    """whether the value was the result of a subtraction, as in a straight-through estimator"""
    callers: tuple[Site, ...] = ()
    """the user's lines that had called this one, where grad mode was off: one of them may have switched it"""


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


@dataclass(slots=True)
class _State:
    live: int = 0
    marks: int = 0
    maker: str = ""
    """the function that made it"""
    site: Site | None = None
    """the user's line that made it; of scalars only"""
    keeper: Any = None


@dataclass(slots=True)
class Origin:
    """Where a node of the graph was made."""

    name: str
    site: Site | None
    module: str


class Tape(TorchFunctionMode):
    """Records what torch functions are called with and what follows from what.

    Args:
        model: its parameters are followed by name.
        listeners: function name -> who hears each call of it, after it has run. `backward` is heard before.
    """

    def __init__(self, model: nn.Module, listeners: Mapping[str, Sequence[Listener]] | None = None) -> None:
        super().__init__()
        self.writes = WriteLog()
        """what wrote into which memory"""
        self.broken: list[Exception] = []
        """errors of listeners, which are our own bugs"""
        self.is_deaf = False
        """whether calls pass unheard"""
        self.witness: Witness | None = None
        """who is shown every function and its call, whose `frame` is not looked up"""
        self.marks: list[Mark] = []
        self.origins: dict[int, Origin] = {}
        """sequence number of a node -> the call that made it"""
        self.functions: dict[type, tuple[Any, ...]] = {}
        """classes of `torch.autograd.Function` -> the arguments of their first call, until somebody takes them"""
        self.used = 0
        """the parameters that some call has used, as bits"""
        self._first_uses: list[tuple[int, Site]] = []
        self.first_node = 0
        """every node that is younger than this was made while the tape was on"""
        self._listeners = dict(listeners or {})
        self._states: dict[int, _State] = {}
        self._modules: list[nn.Module] = []
        self._hooks: list[Any] = []
        self._model = model
        self.names: tuple[str, ...] = ()
        """the parameters that require grad: bit i stands for names[i]"""
        self._bits: dict[int, int] = {}
        self._paths: dict[int, str] = {}

    def begin(self) -> None:
        """Forget what was recorded, and take stock of the model."""
        self.marks.clear()
        self.origins.clear()
        self.functions.clear()
        self._states.clear()
        self.writes.clear()
        self.used = 0
        self._first_uses.clear()
        named = [(name, p) for name, p in self._model.named_parameters() if p.requires_grad]
        self.names = tuple(name for name, _ in named)
        self._bits = {id(parameter): 1 << i for i, (_, parameter) in enumerate(named)}
        self._paths = {id(module): name or "(root)" for name, module in self._model.named_modules()}
        self.first_node = next_node()

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
        self._modules.clear()
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]

    @property
    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the model."""
        return self._model.parameters()

    @property
    def module(self) -> str:
        """The path of the innermost module that is running; empty for none."""
        if not self._modules:
            return ""
        running = self._modules[-1]
        return self._paths.get(id(running), type(running).__name__)

    @property
    def running(self) -> nn.Module | None:
        """The innermost module that is running."""
        return self._modules[-1] if self._modules else None

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the call, then note it."""
        kwargs = kwargs or {}
        name = name_of(func)
        if self.is_deaf or name in ASKS:
            return func(*args, **kwargs)
        tensors = list(_tensors((args, kwargs) if kwargs else args, 3))
        listeners = self._listeners.get(name, ())
        if name == "backward":
            self._tell(listeners, Call(self, name, args, kwargs, None, user_frame(2), tensors))
            if self.witness is not None:
                self._show(self.witness, func, Call(self, name, args, kwargs, None, None, tensors))
            return func(*args, **kwargs)
        if not torch.is_grad_enabled():
            self._note_function(sys._getframe(1))
        out = func(*args, **kwargs)
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

    def wrote(self, tensors: Iterable[Tensor]) -> None:
        """Something that was not heard, such as the step of an optimizer, has written into these."""
        frame = user_frame(2)
        if frame is not None:
            site = site_of(frame)
            for tensor in tensors:
                self.writes.note(tensor, "step", site)

    def live(self, tensor: Tensor) -> int:
        """The parameters that a tensor has a gradient path to, as bits."""
        bit = self._bits.get(id(tensor))
        return bit if bit is not None else self._state(tensor).live

    def marks_of(self, tensor: Tensor) -> Iterator[Mark]:
        """The marks that a tensor's value has met, first ones first."""
        bits = self._state(tensor).marks
        while bits:
            lowest = bits & -bits
            yield self.marks[lowest.bit_length() - 1]
            bits ^= lowest

    def maker(self, tensor: Tensor) -> str:
        """The name of the function that made a tensor; empty where it was made before."""
        return self._state(tensor).maker

    def site_of(self, tensor: Tensor) -> Site | None:
        """The user's line that made a scalar; None where it is not known."""
        return self._state(tensor).site

    def origin_of(self, number: int) -> Origin | None:
        """The call that made a node of this number, also one inside of a call of several nodes, such as an LSTM.

        The nodes of a call come before the one of its result, which is the one that is noted.
        """
        if number < self.first_node:
            return None
        return self.origins.get(min((n for n in self.origins if n >= number), default=-1))

    def first_use_of(self, bit: int) -> Site | None:
        """The user's line that used a parameter first."""
        return next((site for bits, site in self._first_uses if bits & bit), None)

    def names_of(self, bits: int) -> list[str]:
        """The parameters that bits stand for."""
        return [name for i, name in enumerate(self.names) if bits >> i & 1]

    def mark(self, tensor: Tensor, mark: Mark) -> None:
        """Put a mark on a tensor's value."""
        self._known(tensor).marks |= 1 << len(self.marks)
        self.marks.append(mark)

    def _follow(self, name: str, tensors: Sequence[Tensor], out: Any) -> FrameType | None:
        """What the result is made of; the frame where it had to be looked up."""
        live, marks, used = self._gathered(tensors)
        frame = None
        if fresh := used & ~self.used:
            self.used |= fresh
            if (frame := user_frame(3)) is not None:
                self._first_uses.append((fresh, site_of(frame)))
        results = list(_tensors(out, 2))
        if name in ("__setitem__", "copy_") and tensors:
            results = [tensors[0]]
        for result in results:
            node = _node_of(result)
            is_scalar = not result.dim()
            if node is None and not live and not marks and not is_scalar:
                continue
            if frame is None:
                frame = user_frame(3)
            if node is not None:
                self._note(node, name, frame)
            if id(result) in self._bits:
                continue
            state = self._known(result)
            is_cut = bool(live) and not result.requires_grad
            state.marks |= marks | (self._cut(name, tensors, result, live, frame) if is_cut else 0)
            state.live = 0 if is_cut else state.live | live
            state.maker = name
            if is_scalar and frame is not None:
                state.site = site_of(frame)
        if live and not results and name in ESCAPES:
            self._cut(name, tensors, out, live, user_frame(3))
        return frame

    def _gathered(self, tensors: Sequence[Tensor]) -> tuple[int, int, int]:
        """The parameters that these tensors have a path to, the marks that they have met, the parameters among them."""
        live = marks = used = 0
        for tensor in tensors:
            bit = self._bits.get(id(tensor))
            if bit is not None:
                live |= bit if tensor.requires_grad else 0
                used |= bit
                continue
            state = self._states.get(id(tensor))
            if state is not None and state.keeper() is tensor:
                live |= state.live
                marks |= state.marks
        return live, marks, used

    def _cut(self, name: str, tensors: Sequence[Tensor], result: Any, live: int, frame: FrameType | None) -> int:
        source = next((t for t in tensors if self.live(t)), None)
        made_by = None if source is None else _node_of(source)
        node = None if made_by is None else made_by._sequence_nr()
        made = "" if source is None else self._state(source).maker
        site = None if frame is None else site_of(frame)
        reason = cut_reason(name, result)
        if not torch.is_grad_enabled() and _in_checkpoint():
            reason = "a re-entrant checkpoint none of whose inputs requires grad"
        is_difference = made in ("sub", "rsub", "__rsub__", "subtract", "__sub__")
        callers = () if frame is None or torch.is_grad_enabled() else tuple(sites_above(frame))
        self.marks.append(Mark("cut", name, reason, site, self.module, live, node, is_difference, callers))
        return 1 << (len(self.marks) - 1)

    def _note(self, node: Any, name: str, frame: FrameType | None) -> None:
        number = node._sequence_nr()
        if number not in self.origins:
            self.origins[number] = Origin(name, None if frame is None else site_of(frame), self.module)

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

    def _state(self, tensor: Tensor) -> _State:
        state = self._states.get(id(tensor))
        return state if state is not None and state.keeper() is tensor else _NOTHING

    def _known(self, tensor: Tensor) -> _State:
        state = self._states.get(id(tensor))
        if state is None or state.keeper() is not tensor:
            state = self._states[id(tensor)] = _State(keeper=weakref.ref(tensor))
        return state

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

    def _entered(self, module: nn.Module, args: Any) -> None:
        self._modules.append(module)

    def _left(self, module: nn.Module, args: Any, result: Any) -> None:
        if self._modules:
            self._modules.pop()


_NOTHING = _State()
_OF_GRADIENTS = frozenset((".grad", ".grad=", "requires_grad_", "retain_grad"))
"""Calls with a parameter that do not use its value, such as those of `zero_grad`."""
_DEEP = 6
"""Frames above a call in which the forward of a custom function is looked for: wrappers of torch's, helpers."""
_CHECKPOINT = CheckpointFunction.forward.__code__
_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]


def _calling(frame: FrameType) -> FrameType | None:
    """The frame that called a function; one that is written in Python lies between, with torch's dispatch below it."""
    if frame.f_code.co_filename == overrides.__file__ and frame.f_back is not None:
        return frame.f_back.f_back
    return frame


def _in_checkpoint() -> bool:
    """Whether the forward of a re-entrant checkpoint is running."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code is _CHECKPOINT:
            return True
        frame = frame.f_back
    return False


def _node_of(tensor: Tensor) -> Any:
    """The node that made a tensor; None also for a view that torch bars: made under no_grad, its base written to."""
    try:
        return tensor.grad_fn
    except RuntimeError:
        return None


def unheard() -> Any:
    """A context in which no tape hears what is called: for the audit's own looks at tensors."""
    return torch._C.DisableTorchFunction()


def next_node() -> int:
    """The sequence number that the next node of this thread gets."""
    with torch.enable_grad():
        probe = torch.zeros((), requires_grad=True).view(())
    assert probe.grad_fn is not None
    return int(probe.grad_fn._sequence_nr()) + 1


def _tensors(value: Any, depth: int) -> Iterator[Tensor]:
    """The tensors in arguments or results, `depth` levels of containers deep."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item, depth - 1)
    elif depth and isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item, depth - 1)
