"""What each tensor's value descends from: the parameters that reach it, and the marks that it has met on the way."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from safeloop.autograd.numbers import next_number, number_of
from safeloop.autograd.opnames import ESCAPES, cut_reason
from safeloop.autograd.scalars import Scalar, is_followed
from safeloop.autograd.sites import Site, site_of, sites_above, user_frame
from safeloop.autograd.tensors import in_checkpoint, node_of, reference_to, tensors_of


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
class Origin:
    """Where a node of the graph was made."""

    name: str
    site: Site | None
    module: str


@dataclass(slots=True)
class _State:
    live: int = 0
    marks: int = 0
    maker: str = ""
    """the function that made it"""
    site: Site | None = None
    """the user's line that made it; of scalars only"""
    keeper: Any = None
    is_used: bool = False
    """whether a later call was given it"""


class Lineage:
    """Follows values from call to call. Tensors are known by weak references, so that none lives longer.

    Args:
        model: its parameters are followed by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.marks: list[Mark] = []
        self.origins: dict[int, Origin] = {}
        """sequence number of a node -> the call that made it"""
        self.scalars: list[Scalar] = []
        """the numbers with a graph, in the order in which they were made"""
        self.used = 0
        """the parameters that some call has used, as bits"""
        self.names: tuple[str, ...] = ()
        """the parameters that require grad: bit i stands for names[i]"""
        self.first_node = 0
        """every node that is younger than this was made since `begin`"""
        self._model = model
        self._bits: dict[int, int] = {}
        self._paths: dict[int, str] = {}
        self._states: dict[int, _State] = {}
        self._first_uses: list[tuple[int, Site]] = []
        self._read = 0
        """the marks of all values that some call has used, as bits"""
        self._inputs: list[Any] = []
        """of each pass, its first tensor or what that is a view of"""
        self._running: list[nn.Module] = []

    def begin(self) -> None:
        """Forget what was followed, and take stock of the model."""
        self.marks.clear()
        self.origins.clear()
        self.scalars.clear()
        self._states.clear()
        self.used = self._read = 0
        self._first_uses.clear()
        self._inputs.clear()
        named = [(name, p) for name, p in self._model.named_parameters() if p.requires_grad]
        self.names = tuple(name for name, _ in named)
        self._bits = {id(parameter): 1 << i for i, (_, parameter) in enumerate(named)}
        self._paths = {id(module): name or "(root)" for name, module in self._model.named_modules()}
        self.first_node = next_number()

    @property
    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the model."""
        return self._model.parameters()

    @property
    def module(self) -> str:
        """The path of the innermost module that is running; empty for none."""
        return self.path_of(self._running[-1]) if self._running else ""

    @property
    def running(self) -> nn.Module | None:
        """The innermost module that is running."""
        return self._running[-1] if self._running else None

    @property
    def all_running(self) -> Iterator[nn.Module]:
        """The modules that are running, the innermost first."""
        return reversed(self._running)

    def path_of(self, module: nn.Module) -> str:
        """The path of a module of the model; of others the name of their class."""
        return self._paths.get(id(module), type(module).__name__)

    @property
    def num_passes(self) -> int:
        """How many calls of a module there were, not counting those inside of another module's."""
        return len(self._inputs)

    def passes_like(self, number: int) -> list[int]:
        """The other passes, counted from 1, that were called with the same first tensor, or another view of it."""
        given = self._inputs[number - 1]()
        same = [i for i, other in enumerate(self._inputs, 1) if given is not None and other() is given]
        return [i for i in same if i != number]

    def live(self, tensor: Tensor) -> int:
        """The parameters that a tensor has a gradient path to, as bits."""
        bit = self._bits.get(id(tensor))
        return bit if bit is not None else self._state(tensor).live

    def marks_of(self, tensor: Tensor) -> Iterator[Mark]:
        """The marks that a tensor's value has met, first ones first."""
        return self.marks_in(self._state(tensor).marks)

    def marks_in(self, bits: int) -> Iterator[Mark]:
        """The marks that bits stand for."""
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

    def shown(self, tensors: Iterator[Tensor]) -> None:
        """These were printed or formatted, which is a use of them."""
        for tensor in tensors:
            state = self._states.get(id(tensor))
            if state is not None and state.keeper() is tensor:
                state.is_used = True

    def was_read(self, mark: Mark) -> bool:
        """Whether a value that has met a mark went into a further computation."""
        return any(known is mark and self._read >> place & 1 for place, known in enumerate(self.marks))

    def _follow(self, name: str, tensors: Sequence[Tensor], out: Any) -> FrameType | None:
        """What the result is made of; the frame where it had to be looked up."""
        live, marks, used = self._gathered(tensors)
        self._read |= marks
        frame = None
        if fresh := used & ~self.used:
            self.used |= fresh
            if (frame := user_frame(3)) is not None:
                self._first_uses.append((fresh, site_of(frame)))
        results = list(tensors_of(out, 2))
        if name in ("__setitem__", "copy_") and tensors:
            results = [tensors[0]]
        for result in results:
            node = node_of(result)
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
                if node is not None and state.live and is_followed():
                    self.scalars.append(Scalar(number_of(node), state.site, state))
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
                state.is_used = True
                live |= state.live
                marks |= state.marks
        return live, marks, used

    def _cut(self, name: str, tensors: Sequence[Tensor], result: Any, live: int, frame: FrameType | None) -> int:
        source = next((t for t in tensors if self.live(t)), None)
        made_by = None if source is None else node_of(source)
        node = None if made_by is None else number_of(made_by)
        made = "" if source is None else self._state(source).maker
        site = None if frame is None else site_of(frame)
        reason = cut_reason(name, result)
        if not torch.is_grad_enabled() and in_checkpoint():
            reason = "a re-entrant checkpoint none of whose inputs requires grad"
        is_difference = made in ("sub", "rsub", "__rsub__", "subtract", "__sub__")
        callers = () if frame is None or torch.is_grad_enabled() else tuple(sites_above(frame))
        self.marks.append(Mark("cut", name, reason, site, self.module, live, node, is_difference, callers))
        return 1 << (len(self.marks) - 1)

    def _note(self, node: Any, name: str, frame: FrameType | None) -> None:
        number = number_of(node)
        if number not in self.origins:
            self.origins[number] = Origin(name, None if frame is None else site_of(frame), self.module)

    def _state(self, tensor: Tensor) -> _State:
        state = self._states.get(id(tensor))
        return state if state is not None and state.keeper() is tensor else _NOTHING

    def _known(self, tensor: Tensor) -> _State:
        state = self._states.get(id(tensor))
        if state is None or state.keeper() is not tensor:
            state = self._states[id(tensor)] = _State(keeper=weakref.ref(tensor))
        return state

    def _entered(self, module: nn.Module, args: Any) -> None:
        if not self._running:
            self._inputs.append(reference_to(next(tensors_of(args, 2), None)))
        self._running.append(module)

    def _left(self, module: nn.Module, args: Any, result: Any) -> None:
        if self._running:
            self._running.pop()


_NOTHING = _State()
