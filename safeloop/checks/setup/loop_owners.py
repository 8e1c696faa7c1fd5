"""Who shares what, and who trains nothing, in a loop that is not ours: told once the loop has shown that it matters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn

from safeloop.checks.check import EventCheck
from safeloop.checks.events import Backward, Event, Iteration, LoopState, Update, Zero
from safeloop.checks.setup.optimizers import NothingToTrain
from safeloop.checks.setup.ownership import ParameterOwnedTwice
from safeloop.checks.views import Ownership, SetupView
from safeloop.faults import Fault

_OFTEN = 3
"""Steps of an optimizer after which what it holds counts as idle."""


class LoopOwners(EventCheck):
    """Tells SL202 and SL205 in a loop that is not ours.

    Adam may hand over to LBFGS, and a part may thaw later. So two owners count when both step on one gradient, and an
    optimizer without a trainable parameter when it has stepped for nothing until the end.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._moved: dict[str, str] = {}
        """parameter -> who has stepped on the gradient that it holds"""
        self._twice: set[str] = set()
        self._steps: Counter[str] = Counter()
        self._busy: set[str] = set()

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """What an iteration has shown, when it is over."""
        if isinstance(event, Backward):
            self._moved = {name: owner for name, owner in self._moved.items() if name not in event.reached}
        elif isinstance(event, Zero):
            self._moved = {name: owner for name, owner in self._moved.items() if name not in event.parameters}
        elif isinstance(event, Update) and not event.was_skipped:
            self._stepped(event, state)
        elif isinstance(event, Iteration) and self._twice:
            view = SetupView(self._model, _shared(self._model, state, self._twice), state.optimizers)
            self._twice.clear()
            yield from ParameterOwnedTwice.find(view)

    def close(self, state: LoopState) -> Iterator[Fault]:
        """What was idle until the end."""
        idle = {owner for owner, times in self._steps.items() if times >= _OFTEN} - self._busy
        faults = NothingToTrain.find(SetupView(self._model, _shared(self._model, state, set()), state.optimizers))
        yield from (fault for fault in faults if idle and (not self._busy or idle.issuperset(fault.names)))

    def _stepped(self, event: Update, state: LoopState) -> None:
        owned = state.owners[event.owner]
        self._steps[event.owner] += 1
        if owned - event.frozen:
            self._busy.add(event.owner)
        if event.is_deep and not event.has_closure:
            for name in owned - event.absent:
                if self._moved.setdefault(name, event.owner) != event.owner:
                    self._twice.add(name)


def _shared(model: nn.Module, state: LoopState, names: set[str]) -> Ownership:
    """The ownership now; of parameters with several owners, these."""
    parameters = dict(model.named_parameters())
    claims: dict[str, list[str]] = {}
    for owner, optimizer in state.optimizers.items():
        held: list[Any] = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        for tensor in held:
            claims.setdefault(state.name_of.get(id(tensor), ""), []).append(owner)
    return Ownership(
        owner_of={name: owners[0] for name, owners in claims.items() if name in parameters},
        frozen=tuple(name for name, p in parameters.items() if not p.requires_grad and name not in claims),
        unowned=(),
        duplicated={name: tuple(claims[name]) for name in names if len(claims.get(name, ())) > 1},
        foreign={},
    )
