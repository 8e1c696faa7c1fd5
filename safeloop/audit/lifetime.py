"""Finds graphs that outlive their iteration: those that a loss reaches back to, and those that somebody keeps."""

from __future__ import annotations

import bisect
import inspect
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from types import FrameType, ModuleType
from typing import Any

from torch import Tensor, nn

from safeloop.audit.opened import opened
from safeloop.audit.shims import autocast_depth
from safeloop.autograd.numbers import number_of
from safeloop.autograd.sites import Site, is_user_code
from safeloop.autograd.survey import Survey, leaves_below
from safeloop.autograd.tape import Tape
from safeloop.checks.graph.lifetime import GraphReachesBack, GraphsKept, StaleCasts
from safeloop.checks.source import at
from safeloop.checks.wording import counted, listed
from safeloop.faults import Fault

_MOST = 20_000
_GROWN = 4
"""So many earlier iterations must a kept graph span before it counts as growing."""


class Lifetimes:
    """Looks at graphs that are older than the iteration.

    Args:
        names: id of a parameter -> its name.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        self._names = names
        self._starts: list[int] = []
        self._updated: dict[int, int] | None = None
        self._suspect: Fault | None = None
        self._told: set[str] = set()
        self._tape: Tape | None = None

    def begin(self, first_node: int) -> None:
        """An iteration begins, whose first node will have this sequence number."""
        self._starts.append(first_node)

    def updated(self, parameters: Iterable[Tensor], next_node: int) -> None:
        """These were changed before the node of this number; where nobody tells, each iteration changes all."""
        if self._updated is None:
            self._updated = {}
        self._updated.update(dict.fromkeys(map(id, parameters), next_node))

    def reached(self, found: Survey, tape: Tape, site: Site | None, iteration: int) -> Iterator[Fault]:
        """Faults of a backward pass whose graph has edges into an earlier iteration.

        At once for stale autocast copies; for others when the graph spans two earlier iterations, since one may be a
        loop that makes the graph of the next iteration ahead. `suspect` holds the fault meanwhile.
        """
        self._tape = tape
        for node, older in found.old:
            leaves = [self._names[key] for key in leaves_below(older) if self._is_stale(key, number_of(older))]
            if not leaves:
                continue
            origin = tape.origin_of(number_of(node))
            place = at(origin.site, origin.name) if origin is not None else at(site, "the backward pass")
            if older.name().startswith("ToCopy") and autocast_depth():
                yield from self._once(_stale(leaves, site, iteration))
                continue
            fault = _reaches_back(older, leaves, place, site, _holder_of(older))
            self._suspect = fault
            if len(self._starts) > 1 and _oldest(older) < self._starts[-2]:
                yield from self._once(fault)

    def _is_stale(self, key: int, number: int) -> bool:
        """Whether a node was made with an older value of a parameter than it has now."""
        return key in self._names and (self._updated is None or number < self._updated.get(key, 0))

    def suspicion(self) -> Iterator[Fault]:
        """The fault of a graph that reached back, after a backward pass has failed."""
        if self._suspect is not None:
            yield from self._once(self._suspect)

    def kept(self, holders: Iterable[tuple[str, Any]]) -> Iterator[Fault]:
        """Faults of values by name that keep graphs of several earlier iterations."""
        if len(self._starts) <= _GROWN or GraphReachesBack.code in self._told:
            return
        shown: set[int] = set()
        for name, value in opened(holders):
            spans: set[int] = set()
            kept = [(tensor, self._spanned(tensor)) for tensor in _tensors(value)]
            for tensor, old in kept:
                if id(tensor) not in shown:  # a container of a container that was named shows nothing new
                    spans |= old
            if len(spans) >= _GROWN:
                shown |= {id(tensor) for tensor, old in kept if old}
            if len(spans) >= _GROWN and name not in self._told:
                self._told.add(name)
                site = self._made_at(tensor for tensor, _ in kept)
                yield GraphsKept.fault(
                    f"`{name}` keeps the graphs of {counted(len(spans), 'earlier iteration')} alive, one more with "
                    "each",
                    where=f"`{name}`" if site is None else f"`{name}`, made at {at(site, '')}",
                    why="a tensor that is kept keeps its whole graph, with every activation that it saved: memory "
                    "grows, and a later backward pass would go through all of it",
                    fix=f"keep the value alone: `.item()` for a number, `.detach()` for a tensor, or update `{name}` "
                    "under torch.no_grad()",
                    names=(name,),
                )

    def _made_at(self, kept: Iterable[Tensor]) -> Site | None:
        """The user's line that made the youngest of some tensors."""
        numbers = [number_of(tensor.grad_fn) for tensor in kept if tensor.grad_fn is not None]
        origin = self._tape.origins.get(max(numbers, default=-1)) if self._tape is not None else None
        return None if origin is None else origin.site

    def _spanned(self, tensor: Tensor) -> set[int]:
        """The earlier iterations, the last one left out, that a tensor's graph has nodes of."""
        if tensor.grad_fn is None:
            return set()
        spans: set[int] = set()
        waiting: list[Any] = [tensor.grad_fn]
        seen: set[Any] = set(waiting)
        last = len(self._starts) - 1
        while waiting and len(seen) < _MOST:
            node = waiting.pop()
            number = number_of(node)
            index = bisect.bisect_right(self._starts, number) - 1
            if index < last - 1:
                spans.add(index)
                if len(spans) >= _GROWN:
                    return spans
            for following, _ in node.next_functions:
                if following is not None and following not in seen and "AccumulateGrad" not in following.name():
                    seen.add(following)
                    waiting.append(following)
        return spans

    def _once(self, fault: Fault) -> Iterator[Fault]:
        if fault.code not in self._told:
            self._told.add(fault.code)
            yield fault


def _oldest(node: Any) -> int:
    """The lowest sequence number of the inner nodes below a node, as far as a walk of some length comes."""
    lowest = number_of(node)
    waiting, seen = [node], {node}
    while waiting and len(seen) < _MOST:
        current = waiting.pop()
        for following, _ in current.next_functions:
            if following is not None and following not in seen and "AccumulateGrad" not in following.name():
                seen.add(following)
                waiting.append(following)
                lowest = min(lowest, number_of(following))
    return lowest


def _reaches_back(older: Any, leaves: list[str], place: str, site: Site | None, holder: str) -> Fault:
    through = f"`{holder}` (`{older.name()}`)" if holder else f"`{older.name()}`"
    state = holder or "state"
    backward = "" if site is None else at(site, "")
    return GraphReachesBack.fault(
        f"the loss reaches back into the graph of an earlier iteration, through {through}, to {listed(leaves)}",
        where="; ".join(dict.fromkeys(filter(None, (place, backward)))),
        why="a state that is carried from batch to batch was not detached, or a value was computed once before the "
        "loop: each backward pass goes through iterations before it, whose weights have changed since. "
        "retain_graph=True only hides the first error",
        fix=f"cut it at the border, by `{state} = {state}.detach()` before the next batch, or compute it anew in each "
        "iteration",
        names=leaves,
    )


def _holder_of(node: Any) -> str:
    """The variable of a running function of the user's that holds what this node has made; empty for none."""
    for name, value in holders_of_frames(sys._getframe(1)):
        if any(tensor.grad_fn is node for tensor in _tensors(value)):
            return name
    return ""


def _stale(leaves: list[str], site: Site | None, iteration: int) -> Fault:
    return StaleCasts.fault(
        f"the forward uses a copy of {listed(leaves)} that autocast made in an earlier iteration, before the last "
        "update",
        where=f"iteration {iteration}; {at(site, 'the backward pass')}",
        why="autocast keeps its copies of the weights until the outermost region ends; a region around the whole loop "
        "never ends, so training goes on with old weights",
        fix="open `with torch.autocast(...)` around each forward, not around the loop (an outer region with "
        "enabled=False has the same effect)",
        names=leaves,
    )


def holders_of_frames(frame: FrameType | None, *, unless: str = "") -> Iterator[tuple[str, Any]]:
    """Local variables of the user's functions that are running, with the attributes of the user's own objects.

    Args:
        frame: the innermost one.
        unless: functions that use a name with this in it are left out.
    """
    while frame is not None:
        if unless and any(unless in name for name in frame.f_code.co_names):
            frame = frame.f_back
            continue
        if is_user_code(frame.f_code):
            names = frame.f_locals
            for name, value in list(names.items()):
                if name == "self" and not isinstance(value, nn.Module):
                    yield from ((f"self.{key}", held) for key, held in vars_of(value).items())
                else:
                    yield name, value
                    if _is_record(value):
                        yield from ((f"{name}.{key}", held) for key, held in vars_of(value).items())
            if frame.f_code.co_flags & inspect.CO_OPTIMIZED and isinstance(names, dict):
                names.clear()  # before Python 3.13 a snapshot that the frame keeps: it would keep what it shows alive
        frame = frame.f_back


def globals_of_frames(frame: FrameType | None) -> Iterator[tuple[str, Any]]:
    """Globals that the user's running functions use: lists of losses, and functions that use others."""
    while frame is not None:
        code, names = frame.f_code, frame.f_globals
        if is_user_code(code) and frame.f_locals is not names:
            yield from ((name, names[name]) for name in code.co_names if name in names)
        frame = frame.f_back


def holders_of_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Attributes of the modules that are neither parameters nor modules."""
    for path, module in model.named_modules():
        for key, value in (*module.__dict__.items(), *module._buffers.items()):
            if not key.startswith("_"):
                yield f"{path}.{key}" if path else key, value


def _is_record(value: Any) -> bool:
    """Whether a value is an object of a class that the user has written: a history, a meter, a buffer of results."""
    kind = type(value)
    if isinstance(value, (nn.Module, Tensor, type, ModuleType)) or not hasattr(value, "__dict__"):
        return False
    return kind.__module__.partition(".")[0] not in (*sys.stdlib_module_names, "torch", "safeloop", "numpy")


def vars_of(value: Any) -> dict[str, Any]:
    """The attributes of an object."""
    return dict(getattr(value, "__dict__", {}))


def _tensors(value: Any, depth: int = 2) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (list, tuple, set, frozenset, deque)):
        for item in list(value)[-200:]:
            yield from _tensors(item, depth - 1)
    elif depth and isinstance(value, dict):
        for item in list(value.values())[-200:]:
            yield from _tensors(item, depth - 1)
