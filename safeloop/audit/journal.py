"""The journal of a loop: what happened to its gradients, in order, and what `.grad` holds; the checks are told."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from safeloop.autograd.sites import Site
from safeloop.checks.events import (
    Backward,
    Event,
    GradientUse,
    Held,
    Iteration,
    LoopState,
    Unscale,
    Update,
    Zero,
)

_MOST = 400
"""Events that are remembered."""


class Journal:
    """Keeps the events of a loop and what `.grad` holds.

    Args:
        parameters: name -> parameter: those of the model, and what else the optimizers hold.
        owners: owner -> its optimizer.
        tell: is called with each event and the state from before it.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        owners: Mapping[str, Any],
        tell: Callable[[Event, LoopState], None],
    ) -> None:
        self.iteration = 0
        self.since = 0
        """sequence number of the first node of this iteration"""
        self.parameters: dict[str, Any] = dict(parameters)
        self.names = {id(parameter): name for name, parameter in parameters.items()}
        self.numbers = itertools.count()
        self.state = LoopState(optimizers=owners, name_of=self.names)
        for owner, optimizer in owners.items():
            self.claim(owner, optimizer)
        self._tell = tell
        self._pending: dict[str, set[str]] = {"read": set(), "write": set(), "zero": set()}
        self._where: Site | None = None

    def claim(self, owner: str, optimizer: Any) -> list[tuple[str, Any]]:
        """The parameters of an optimizer by name, those of groups that were added since among them."""
        held = []
        for g, group in enumerate(optimizer.param_groups):
            for i, parameter in enumerate(group["params"]):
                name = self.names.get(id(parameter))
                if name is None:
                    name = self.names[id(parameter)] = f"{owner}[{g}][{i}]"
                    self.parameters[name] = parameter
                held.append((name, parameter))
        names = frozenset(name for name, _ in held)
        if names != self.state.owners.get(owner):
            self.state.owners[owner] = names
            self.state.owner_of.update(dict.fromkeys(names, owner))
        return held

    def owner_of(self, optimizer: Optimizer | None) -> str | None:
        """The name of an optimizer, also of one that a watched wrapper hands its groups to."""
        for name, known in self.state.optimizers.items():
            if known is optimizer or getattr(known, "optimizer", None) is optimizer is not None:
                return name
        return None

    def open(self) -> None:
        """A stretch of steps begins in which everything is seen."""
        self.state.held = {name: Held() for name, p in self.parameters.items() if p.grad is None}
        self.state.is_known = True

    def close(self) -> None:
        """The stretch is over: what `.grad` holds is no longer followed."""
        self.flush()
        self.state.held = {}
        self.state.unscaled.clear()
        self.state.is_known = False

    def record(self, event: Event) -> None:
        """Tell the checks of an event, then let it change the state."""
        self.flush()
        self._record(event)

    def stepped(self, owner: str) -> None:
        """A step is over: the backward passes of its closure are used."""
        if self.state.is_known:
            self.flush()
        self.state.inside = ""
        if self.state.is_known:
            self._use_up(owner)

    def note(self, kind: str, site: Site | None, names: Iterable[str]) -> None:
        """Gradients were read, written or zeroed by a line; one event for all that it does to them in a row."""
        if site != self._where:
            self.flush()
            self._where = site
        self._pending[kind].update(names)
        if kind == "zero":
            self._pending["read"].difference_update(names)  # `p.grad.zero_()` reads what it throws away

    def flush(self) -> None:
        """Record what was noted."""
        for kind, names in self._pending.items():
            if not names:
                continue
            self._pending[kind] = set()
            if kind == "zero":
                self._record(Zero(self._where, self.iteration, frozenset(names)))
            else:
                self._record(GradientUse(self._where, self.iteration, kind == "write", frozenset(names)))

    def reset(self, name: str) -> None:
        """Nothing is in `.grad` of a parameter any more."""
        if self.state.is_known:
            self.state.held[name] = Held()
        if (owner := self.state.owner_of.get(name)) is not None:
            self.state.unscaled.discard(owner)

    def _record(self, event: Event) -> None:
        self._tell(event, self.state)
        self._apply(event)
        for events in (self.state.order, self.state.recent):
            events.append(event)
        del self.state.recent[:-_MOST]
        if isinstance(event, Iteration):
            self.state.order.clear()

    def _apply(self, event: Event) -> None:
        state = self.state
        if isinstance(event, Backward):
            for name in event.reached & state.held.keys():
                state.held[name].passes.append(event)
        elif isinstance(event, Zero):
            for name in event.parameters:
                self.reset(name)
        elif isinstance(event, GradientUse):
            for name in event.parameters & state.held.keys() if event.is_write else ():
                state.held[name].is_manual = True
        elif isinstance(event, Unscale):
            state.unscaled.add(event.owner)
        elif isinstance(event, Update):
            self._updated(event)
        elif isinstance(event, Iteration):
            state.inside = ""

    def _updated(self, event: Update) -> None:
        if not event.was_skipped:
            self.state.updates[event.owner] += 1
            self.state.last_update[event.owner] = event
        self._use_up(event.owner)
        self.state.unscaled.discard(event.owner)

    def _use_up(self, owner: str) -> None:
        for name in self.state.owners[owner] & self.state.held.keys():
            self.state.held[name].used = len(self.state.held[name].passes)


def is_zero(gradient: Tensor) -> bool:
    """Whether every entry is zero; reads the device."""
    values = gradient._values() if gradient.is_sparse else gradient
    return not bool(values.detach().any())


def named_by_place(model: nn.Module, optimizers: Mapping[str, Optimizer]) -> dict[str, nn.Parameter]:
    """The parameters of the model by name, and what else the optimizers hold by its place there."""
    named: dict[str, Any] = dict(model.named_parameters())
    known = {id(p) for p in named.values()}
    for owner, optimizer in optimizers.items():
        for g, group in enumerate(optimizer.param_groups):
            for i, tensor in enumerate(group["params"]):
                if id(tensor) not in known:
                    known.add(id(tensor))
                    named[f"{owner}[{g}][{i}]"] = tensor
    return named
