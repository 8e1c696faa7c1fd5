"""Who owns what in a loop that is not ours: told once the loop has shown that it matters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from safeloop.checks.check import EventCheck
from safeloop.checks.events import Backward, Event, Iteration, LoopState, Update, Zero
from safeloop.checks.setup.optimizers import NothingToTrain, StaleOptimizer
from safeloop.checks.setup.ownership import ParameterOwnedTwice, UnownedParameter
from safeloop.checks.views import Ownership, SetupView
from safeloop.faults import Fault

_OFTEN = 3
"""Steps of an optimizer after which what it holds counts as idle."""


class LoopOwners(EventCheck):
    """Tells SL201, SL202, SL204 and SL205 in a loop that is not ours.

    Such a loop owes nobody a list of what is frozen: a teacher is used under no_grad, an image or a temperature is
    trained beside the model, Adam hands over to LBFGS, a part thaws later. So a parameter without an owner counts when
    a gradient reaches it, two owners when both step on one gradient, a stranger when it has none while parameters
    without an owner do, and an optimizer without a trainable parameter when it has stepped for nothing until the end.
    """

    code = UnownedParameter.code
    title = UnownedParameter.title

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._reached: set[str] = set()
        self._told: set[str] = set()
        self._moved: dict[str, str] = {}
        self._twice: set[str] = set()
        self._alive: set[str] = set()
        self._steps: Counter[str] = Counter()
        self._busy: set[str] = set()

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """What an iteration has shown, when it is over."""
        if isinstance(event, Backward):
            self._reached |= {name for name in event.reached - state.owner_of.keys() if self._is_at_work(name)}
            for name in event.reached & self._moved.keys():
                del self._moved[name]
        elif isinstance(event, Zero):
            for name in event.parameters & self._moved.keys():
                del self._moved[name]
        elif isinstance(event, Update) and not event.was_skipped:
            self._stepped(event, state)
        elif isinstance(event, Iteration):
            yield from self._shown(state)

    def close(self, state: LoopState) -> Iterator[Fault]:
        """What was idle until the end; where no backward pass was heard, what has a gradient all the same."""
        parameters, view = dict(self._model.named_parameters()), self._view(state)
        self._reached |= {n for n in view.ownership.unowned if parameters[n].grad is not None and self._is_at_work(n)}
        yield from self._shown(state)
        if not self._told:
            yield from StaleOptimizer.find(replace(view, ownership=replace(view.ownership, unowned=())))
        idle = {owner for owner, times in self._steps.items() if times >= _OFTEN} - self._busy
        if idle and not self._busy:
            yield from NothingToTrain.find(view)
        elif idle:
            yield from (fault for fault in NothingToTrain.find(view) if idle.issuperset(fault.names))

    def _stepped(self, event: Update, state: LoopState) -> None:
        owned = state.owners[event.owner]
        self._steps[event.owner] += 1
        if owned - event.frozen:
            self._busy.add(event.owner)
        if event.has_closure:
            self._alive |= owned
            return
        self._alive |= owned - event.absent
        if event.is_deep:
            for name in owned - event.absent:
                if self._moved.setdefault(name, event.owner) != event.owner:
                    self._twice.add(name)

    def _shown(self, state: LoopState) -> Iterator[Fault]:
        unowned = self._reached - self._told - state.owner_of.keys()
        if not unowned and not self._twice:
            return
        view = self._view(state)
        known = view.ownership
        shared = {n: owners for n, owners in known.duplicated.items() if n in self._twice}
        seen = replace(known, unowned=tuple(n for n in known.unowned if n in unowned), duplicated=shared)
        view = replace(view, ownership=seen)
        if unowned:
            yield from StaleOptimizer.find(view)
        yield from ParameterOwnedTwice.find(view)
        yield from UnownedParameter.find(view)
        self._told |= unowned
        self._twice.clear()

    def _view(self, state: LoopState) -> SetupView:
        """The owners as they are now; of what is no parameter of the model, only what never had a gradient."""
        seen = _ownership(self._model, state)
        idle = {
            owner: tuple(t for t in tensors if state.name_of.get(id(t)) not in self._alive)
            for owner, tensors in seen.foreign.items()
            if self._steps[owner]
        }
        seen = replace(seen, foreign={owner: tensors for owner, tensors in idle.items() if tensors})
        return SetupView(self._model, seen, state.optimizers)

    def _is_at_work(self, name: str) -> bool:
        """Whether a parameter's module is not in eval mode beside others that train, as a fixed network is."""
        module = self._model.get_submodule(name.rpartition(".")[0])
        return module.training or not any(m.training and m._parameters for m in self._model.modules())


def _ownership(model: nn.Module, state: LoopState) -> Ownership:
    parameters: Mapping[str, Any] = dict(model.named_parameters())
    name_of = {id(p): name for name, p in parameters.items()}  # pruning renames a parameter
    claims: dict[str, list[str]] = {}
    foreign = {}
    for owner, optimizer in state.optimizers.items():
        held = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        for tensor in held:
            claims.setdefault(name_of.get(id(tensor), ""), []).append(owner)
        if strangers := tuple(tensor for tensor in held if id(tensor) not in name_of):
            foreign[owner] = strangers
    return Ownership(
        owner_of={name: owners[0] for name, owners in claims.items() if name in parameters},
        frozen=tuple(name for name, p in parameters.items() if not p.requires_grad and name not in claims),
        unowned=tuple(name for name, p in parameters.items() if p.requires_grad and name not in claims),
        duplicated={name: tuple(owners) for name, owners in claims.items() if len(owners) > 1 and name in parameters},
        foreign=foreign,
    )
