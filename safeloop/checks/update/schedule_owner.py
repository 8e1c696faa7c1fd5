"""Learning-rate schedules that move the wrong optimizer."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from safeloop.autograd.sites import Site
from safeloop.checks.check import EventCheck
from safeloop.checks.events import Event, Iteration, LoopState, Schedule, Update
from safeloop.checks.process import alive
from safeloop.checks.source import at
from safeloop.faults import Fault

_RESTS = 3
"""Moves of a schedule since its optimizer was stepped last."""
_LOOKS = 5
_SOME = 8


class ScheduleOfAnotherOptimizer(EventCheck):
    """A schedule moves an optimizer that is not the one that steps.

    ## What it does
    Looks for schedules of the process whose optimizer is not watched and holds parameters of one that is. Speaks at the
    second move of one whose optimizer was never stepped. Where it was stepped once, it must have rested since, for
    three moves that change its rate, while another one of its class steps the same parameters, at a rate that nothing
    changes: a watched one, or one that was built since and is found among the objects of the process.

    ## Why it is bad
    A scheduler holds the optimizer that it was given. Where that was built again later, for a new group, after a change
    of the model, the schedule moves the learning rate of the old object, and the new one keeps its first rate for ever.

    ## Bad
    ```python
    import warnings

    warnings.simplefilter("ignore")  # PyTorch's own, which asks for another order
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(6):
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
            optimizer.step()
            scheduler.step()
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(6):
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
            optimizer.step()
            scheduler.step()
            audit.step()
    ```
    ## Fix
    Build the scheduler after the optimizer, and again whenever the optimizer is built again.

    ## Source
    https://github.com/nianticlabs/manydepth/issues/46.
    """

    code = "SL646"
    title = "schedule of another optimizer"
    severity = "warning"

    def __init__(self) -> None:
        self._times: Counter[int] = Counter()
        self._resting: dict[int, _Resting] = {}
        self._told: set[str] = set()
        self._steps: dict[str, Update] = {}

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At a move of a schedule whose optimizer does not step, while another one steps the same parameters."""
        if isinstance(event, Update):
            self._steps[event.owner] = event
        elif isinstance(event, Iteration):
            yield from self._looked_at(state)
        if not isinstance(event, Schedule):
            return
        if event.owner or event.was_updated:
            known = self._resting.setdefault(id(event.scheduler), _Resting(event.scheduler, event.owner))
            known.moved(state)
            if not state.is_known:  # a plain iteration, whose end is not told
                yield from self._looked_at(state)
            return
        self._times[id(event.scheduler)] += 1
        if self._times[id(event.scheduler)] != 2 or not state.updates:
            return
        owner = next((o for o in state.optimizers if _are_rivals(state.optimizers[o], event.scheduler.optimizer)), None)
        if owner is not None:
            yield self._fault(
                event.scheduler, f"an old optimizer that is never stepped; `{owner}`, which steps,", owner, None
            )

    def _looked_at(self, state: LoopState) -> Iterator[Fault]:
        """Where an optimizer rests that was stepped once: whether another one has taken its place."""
        for known in self._resting.values():
            busy = known.busy(state) if known.is_due else None
            optimizer = known.scheduler.optimizer
            if busy is None or known.moves < _RESTS or _rates(optimizer) in (known.rates, _rates(busy)):
                continue
            if not any(getattr(one, "optimizer", None) is busy for one in alive(LRScheduler)):
                yield from self._replaced(known, busy, state)

    def _replaced(self, known: _Resting, busy: Any, state: LoopState) -> Iterator[Fault]:
        name = next((o for o, one in state.optimizers.items() if one is busy), "")
        shown = f"`{known.owner}`" if known.owner else "an old optimizer"
        other = f"`{name}`" if name else f"another {type(busy).__name__}, which was built later,"
        owner = known.owner or name
        if owner not in self._told:
            self._told.add(owner)
            line = self._steps[name].site if name in self._steps else state.stray_step
            yield self._fault(known.scheduler, f"{shown}, which is no longer stepped; {other} steps,", owner, line)

    def _fault(self, scheduler: Any, whose: str, owner: str, step: Site | None) -> Fault:
        kind = type(scheduler).__name__
        return self.fault(
            f"{kind} moves the learning rate of {whose} holds the same parameters and keeps its rate",
            where=at(step, f"schedule {kind}"),
            why="the optimizer was re-created after the scheduler had been built for it: a scheduler holds the object "
            "that it was given",
            fix="build the scheduler after the optimizer, and again whenever the optimizer is built again",
            names=(owner,),
        )


class _Resting:
    """A schedule whose optimizer may rest.

    Args:
        scheduler: the schedule.
        owner: the name of its optimizer; empty where that is not watched.
    """

    def __init__(self, scheduler: Any, owner: str) -> None:
        self.scheduler, self.owner = scheduler, owner
        self.rates = _rates(scheduler.optimizer)
        """those at its first move"""
        self.moves = 0
        """so many in a row without a step of its optimizer"""
        self.is_due = False
        """whether others are to be looked at"""
        self._mark: Any = None
        self._looks = 0
        self._seen: dict[int, tuple[Any, tuple[float, ...], Any]] = {}
        """optimizers that may have taken its place: a reference, their rates, and what tells of their steps"""

    def moved(self, state: LoopState) -> None:
        """It was moved once more."""
        mark = state.updates[self.owner] if self.owner else _marks(self.scheduler.optimizer)
        self.moves = self.moves + 1 if mark == self._mark and mark != () else 1
        self._mark = mark
        self.is_due = self.moves >= _RESTS - 1 and self._looks < _LOOKS

    def busy(self, state: LoopState) -> Any:
        """An optimizer of the same class that has stepped the same parameters since the last look, at one rate."""
        self.is_due = False
        self._looks += 1
        old, found = self.scheduler.optimizer, None
        seen, self._seen = self._seen, {}
        watched = {id(one): owner for owner, one in state.optimizers.items()}
        for one in alive(Optimizer) if self.owner else state.optimizers.values():
            if one is old or type(one) is not type(old) or not _are_rivals(one, old):
                continue
            if self.owner and id(one) in watched:
                continue
            marks = state.updates[watched[id(one)]] if id(one) in watched else _marks(one)
            reference, rates, before = seen.get(id(one), (None, _rates(one), None))
            is_same = reference is not None and reference() is one
            if marks and seen and rates == _rates(one) and not (is_same and before == marks):
                found = one
            self._seen[id(one)] = weakref.ref(one), _rates(one), marks
        return found


def _rates(optimizer: Any) -> tuple[float, ...]:
    rates = [group.get("lr") for group in optimizer.param_groups]
    return tuple(rate for rate in rates if isinstance(rate, float | int))


def _marks(optimizer: Any) -> tuple[int, ...]:
    """What changes with each step of an optimizer that remembers something; nothing is read from the device."""
    some = [value for _, value in zip(range(_SOME), optimizer.state.values(), strict=False) if isinstance(value, dict)]
    return tuple(tensor._version for value in some for tensor in value.values() if isinstance(tensor, Tensor))


def _are_rivals(one: Any, other: Any) -> bool:
    """Whether two optimizers hold the same parameters in groups of their own, and none is part of the other."""
    if any(a is b for a in one.param_groups for b in other.param_groups):
        return False
    if any(held is other for held in vars(one).values()) or any(held is one for held in vars(other).values()):
        return False
    theirs = {id(p) for group in other.param_groups for p in group["params"]}
    return any(id(p) in theirs for group in one.param_groups for p in group["params"])
