"""Freezing without effect (SL210) that somebody tries while the loop runs."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from safeloop.checks.check import EventCheck
from safeloop.checks.events import Event, Iteration, LoopState
from safeloop.checks.setup.freezing import FreezeWithoutEffect
from safeloop.checks.views import Ownership, SetupView
from safeloop.faults import Fault


class LateFreezing(EventCheck):
    """Looks for SL210 once more, a few times while the loop runs.

    What is set is told at the second look that finds it, when updates have happened in between: an attribute that is
    set after training, or for a moment, harms nobody. Parameters that have been frozen and trained are switched by
    somebody who knows how, whatever else he sets.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._found: dict[tuple[str, ...], int] = {}
        self._next = 3
        self._were: dict[str, set[bool]] = {}
        self._note()

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the end of some iterations."""
        if isinstance(event, Iteration) and self.is_due(event.iteration):
            yield from self._in_loop(state)

    def close(self, state: LoopState) -> Iterator[Fault]:
        """Once more, for what the last look has seen first."""
        yield from self._in_loop(state)

    def is_due(self, iteration: int) -> bool:
        """Whether to look after this iteration: more and more rarely."""
        if iteration < self._next:
            return False
        self._next = iteration + max(3, iteration // 2)
        return True

    def look(self, view: SetupView, updates: int) -> list[Fault]:
        """What was there at the look before, after which there were more updates."""
        self._note()
        found = {(fault.where, *fault.names): fault for fault in FreezeWithoutEffect.find(view, is_late=True)}
        self._found = {key: self._found.get(key, updates) for key in found}
        switched = {name for name, were in self._were.items() if len(were) > 1}
        return [f for key, f in found.items() if updates > self._found[key] and switched.isdisjoint(f.names)]

    def _note(self) -> None:
        for name, p in self._model.named_parameters():
            self._were.setdefault(name, set()).add(p.requires_grad)

    def _in_loop(self, state: LoopState) -> Iterator[Fault]:
        yield from self.look(SetupView(self._model, Ownership(dict(state.owner_of))), sum(state.updates.values()))
