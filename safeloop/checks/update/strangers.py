"""Tensors that get gradients, and belong neither to the model nor to an optimizer."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from types import FrameType
from typing import Any, ClassVar
from weakref import ref

from torch import Tensor, nn

from safeloop.autograd.sites import Site, is_user_code
from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck, EventCheck
from safeloop.checks.events import Backward, Event, GradientUse, Iteration, LoopState, Stranger
from safeloop.checks.process import held_by_any_optimizer
from safeloop.checks.setup.scan import items_of, unregistered
from safeloop.checks.source import at
from safeloop.checks.wording import counted, listed
from safeloop.faults import Fault

_ENOUGH = 5
"""Iterations in which the same tensor got a gradient that nobody has used."""


@dataclass(slots=True)
class _Seen:
    tensor: Any
    """a weak reference"""
    site: Site | None
    version: int
    is_before_the_model_ends: bool
    iterations: set[int] = field(default_factory=set)


class LeafOfNobody(EventCheck, CallCheck):
    """A tensor that is made to be learned gets gradients, but no module of the model and no optimizer holds it.

    ## What it does
    Looks, at each backward pass, for leaves that are no parameter of the model, and speaks when the same one got a
    gradient in five iterations that nobody has read or applied. Tensors are left out that some optimizer of the process
    holds, that `torch.autograd.grad` is asked about, that have a hook, or that change between the passes. Of
    parameters of a module that is not in the model, only those are meant whose module is in train mode and has a
    class of the user's, or feeds the model: a network that only judges the model's output is not meant to train.

    ## Why it is bad
    A learnable temperature beside the model, a criterion with weights of its own, or an adapter that hangs in a hook:
    each has `requires_grad=True` and a gradient, which makes it look trained, and keeps its initial value.

    ## Bad
    ```python
    model = nn.Linear(4, 4)
    temperature = torch.tensor(1.0, requires_grad=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(6):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(8, 4)) * temperature, torch.randint(0, 4, (8,))).backward()
            optimizer.step()
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Linear(4, 4)
    temperature = torch.tensor(1.0, requires_grad=True)
    optimizer = torch.optim.SGD([*model.parameters(), temperature], lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(6):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(8, 4)) * temperature, torch.randint(0, 4, (8,))).backward()
            optimizer.step()
            audit.step()
    ```
    ## Fix
    Hand it to an optimizer, or make it a parameter of the model before the optimizer is built; drop `requires_grad`
    where it is a constant.

    ## Source
    https://github.com/pytorch/pytorch/issues/20089; safeloop's own rule.
    """

    code = "SL215"
    title = "learnable tensor of nobody"
    hears: ClassVar[frozenset[str]] = frozenset(("grad",))

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen: dict[int, _Seen] = {}
        self._known: set[int] = set()
        """ids of what is not looked at again"""
        self._inputs_are_read = False

    def hear(self, call: Call) -> Iterator[Fault]:
        """What autograd.grad is asked about has a use of its own."""
        self._known |= {id(tensor) for tensor in call.tensors if tensor.is_leaf}
        return iter(())

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the end of the fifth iteration that reached the same tensors."""
        if isinstance(event, Backward):
            if state.strangers and state.optimizers:
                ends = [high for name, (_, high) in event.used_at.items() if name in state.owner_of]
                for stranger in state.strangers:
                    self._note(stranger, event, max(ends, default=-1))
        elif isinstance(event, GradientUse):
            self._inputs_are_read |= "" in event.parameters
        elif isinstance(event, Iteration) and any(len(s.iterations) >= _ENOUGH for s in self._seen.values()):
            yield from self._tell()

    def _note(self, stranger: Stranger, event: Event, end: int) -> None:
        tensor = stranger.tensor
        key = id(tensor)
        if key in self._known or tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
            return
        seen = self._seen.get(key)
        if seen is None or seen.tensor() is not tensor or seen.version != tensor._version:
            seen = _Seen(ref(tensor), stranger.site, tensor._version, stranger.last_use < end)
            self._seen[key] = seen
        seen.iterations.add(event.iteration)

    def _tell(self) -> Iterator[Fault]:
        ready = {key: seen for key, seen in self._seen.items() if len(seen.iterations) >= _ENOUGH}
        self._known |= ready.keys()
        for key in ready:
            del self._seen[key]
        alive = [(seen.tensor(), seen) for seen in ready.values()]
        elsewhere = {id(tensor) for tensor in chain(self._model.parameters(), unregistered(self._model))}
        elsewhere |= held_by_any_optimizer(tensor for tensor, _ in alive if tensor is not None)
        found: dict[str, _Seen] = {}
        for tensor, seen in alive:
            if tensor is None or id(tensor) in elsewhere or tensor.grad is None or not bool(tensor.grad.any()):
                continue  # a dummy input of a checkpoint gets none
            if name := self._name(tensor, seen):
                found[name] = seen
        if found:
            yield self._fault(found)

    def _name(self, tensor: Tensor, seen: _Seen) -> str:
        """What the user calls it; empty where it is not meant to train."""
        if not isinstance(tensor, nn.Parameter) and self._inputs_are_read:
            return ""
        for name, module, owner in _holders(tensor):
            if module is None:
                return name
            if module.training and (seen.is_before_the_model_ends or not type(owner).__module__.startswith("torch.")):
                return name
        return ""

    def _fault(self, found: dict[str, _Seen]) -> Fault:
        first = next(iter(found.values()))
        verb = "gets a gradient" if len(found) == 1 else "get gradients"
        return self.fault(
            f"{listed(found)} {verb} in every iteration, but {'is' if len(found) == 1 else 'are'} neither in the model "
            "nor in an optimizer",
            where=f"used at {at(first.site, 'an unknown line')}; {counted(len(found), 'tensor')}",
            why="`requires_grad` alone trains nothing: no optimizer updates it, no `state_dict()` saves it",
            fix="hand it to an optimizer, or make it a parameter of the model before the optimizer is built; drop "
            "`requires_grad` where it is a constant",
            names=list(found),
        )


def _holders(tensor: Tensor) -> Iterator[tuple[str, nn.Module | None, nn.Module | None]]:
    """Names of a tensor in the running functions and their files; with the module that has it, and the inner one."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if is_user_code(frame.f_code):
            names = frame.f_locals
            for name, value in [*names.items(), *frame.f_globals.items()]:
                yield from _inside(name, value, tensor, 3)
            if frame.f_code.co_flags & inspect.CO_OPTIMIZED and isinstance(names, dict):
                names.clear()  # before Python 3.13 a snapshot that the frame keeps: it would keep what it shows alive
        frame = frame.f_back


def _inside(name: str, value: Any, tensor: Tensor, depth: int) -> Iterator[tuple[str, Any, Any]]:
    if value is tensor:
        yield name, None, None
    elif isinstance(value, nn.Module):
        for path, parameter in value.named_parameters():
            if parameter is tensor:
                yield f"{name}.{path}", value, value.get_submodule(path.rpartition(".")[0])
    elif depth and isinstance(value, (list, tuple, dict, set)):
        for key, item in items_of(value):
            yield from _inside(f"{name}[{key!r}]", item, tensor, depth - 1)
    elif depth and _is_plain(value):
        for key, item in list(vars(value).items()):
            yield from _inside(f"{name}.{key}", item, tensor, depth - 1)


def _is_plain(value: Any) -> bool:
    """Whether it is an object of a class that is not torch's, ours or Python's."""
    root = type(value).__module__.partition(".")[0]
    return hasattr(value, "__dict__") and root not in ("torch", "safeloop", "builtins", "types")
