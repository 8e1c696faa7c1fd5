"""Learning-rate schedules that move too often, or twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from safeloop.checks.check import EventCheck
from safeloop.checks.events import Event, LoopState, Schedule, Update
from safeloop.checks.source import at
from safeloop.checks.wording import listed
from safeloop.faults import Fault

_CYCLES = 4
_NOTHING = 1e-8
"""A learning rate that has fallen by this factor trains nothing."""


class ScheduledTwice(EventCheck):
    """Two schedules of the same kind move one optimizer, and another optimizer has none.

    ## What it does
    Counts which schedules move which optimizer. Speaks where two of one class, with the same settings, have both moved
    the same optimizer twice, while another one that steps has no schedule.

    ## Why it is bad
    `scheduler_g = ExponentialLR(optimizer_d, ...)`: a line was copied and one name not changed. One learning rate falls
    twice as fast as meant, the other one never.

    ## Bad
    ```python
    G, D = nn.Linear(4, 4), nn.Linear(4, 1)
    g, d = torch.optim.SGD(G.parameters(), lr=0.01), torch.optim.SGD(D.parameters(), lr=0.01)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(d, 0.9), torch.optim.lr_scheduler.ExponentialLR(d, 0.9)]
    with sl.audit(model={"G": G, "D": D}, optimizers={"g": g, "d": d}, on_fault="collect") as audit:
        for _ in range(6):
            g.zero_grad(), d.zero_grad()
            D(G(torch.randn(8, 4))).square().mean().backward()
            g.step(), d.step()
            for schedule in schedules:
                schedule.step()
            audit.step()
    ```
    ## Good
    ```python
    G, D = nn.Linear(4, 4), nn.Linear(4, 1)
    g, d = torch.optim.SGD(G.parameters(), lr=0.01), torch.optim.SGD(D.parameters(), lr=0.01)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(g, 0.9), torch.optim.lr_scheduler.ExponentialLR(d, 0.9)]
    with sl.audit(model={"G": G, "D": D}, optimizers={"g": g, "d": d}, on_fault="collect") as audit:
        for _ in range(6):
            g.zero_grad(), d.zero_grad()
            D(G(torch.randn(8, 4))).square().mean().backward()
            g.step(), d.step()
            for schedule in schedules:
                schedule.step()
            audit.step()
    ```
    ## Fix
    Build each scheduler with the optimizer that it is named for.

    ## Source
    safeloop's own rule.
    """

    code = "SL658"
    title = "one optimizer with the schedule of two"
    severity = "warning"

    def __init__(self) -> None:
        self._moves: dict[str, Counter[int]] = {}
        self._schedulers: dict[int, Any] = {}
        self._told: set[str] = set()

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the second move of the second of two schedules."""
        if not isinstance(event, Schedule) or not event.owner or event.owner in self._told:
            return
        moves = self._moves.setdefault(event.owner, Counter())
        moves[id(event.scheduler)] += 1
        self._schedulers[id(event.scheduler)] = event.scheduler
        without = sorted(state.updates.keys() - self._moves.keys())
        mine = _settings(event.scheduler)
        twins = [key for key, times in moves.items() if times >= 2 and _settings(self._schedulers[key]) == mine]
        if len(twins) < 2 or not without:
            return
        self._told.add(event.owner)
        kind = type(event.scheduler).__name__
        yield self.fault(
            f"two schedulers {kind} with the same settings both move the learning rate of `{event.owner}`, and none "
            f"moves that of {listed(without)}",
            where=f"schedulers {kind}, optimizer `{event.owner}`",
            why=f"the learning rate of `{event.owner}` falls twice as fast as meant; {listed(without)} keeps its own",
            fix=f"build one of the two {kind} with {listed(without)} instead of `{event.owner}`",
            names=(event.owner, *without),
        )


class ScheduleRunsOver(EventCheck):
    """A schedule has gone through its whole range many times, or has taken the rate to nothing.

    ## What it does
    Looks at each step of an optimizer. Speaks where a `CosineAnnealingLR` was moved four times its `T_max`, as often as
    its optimizer was stepped; and at the fifth step in a row with a learning rate below 1e-8 of the largest one.

    ## Why it is bad
    A scheduler counts its own moves. `T_max=epochs` with a `scheduler.step()` for each batch sends the rate down and up
    again all the time; a `ReduceLROnPlateau` that is given the loss of each batch takes its noise for a plateau, and
    the rate collapses within an epoch.

    ## Bad
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for epoch in range(2):
            for _ in range(5):
                optimizer.zero_grad()
                model(torch.randn(8, 4)).square().mean().backward()
                optimizer.step()
                scheduler.step()
                audit.step()
    ```
    ## Good
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for epoch in range(2):
            for _ in range(5):
                optimizer.zero_grad()
                model(torch.randn(8, 4)).square().mean().backward()
                optimizer.step()
                audit.step()
            scheduler.step()
    ```
    ## Fix
    Call `scheduler.step()` once an epoch, or give the scheduler the number of steps instead of epochs.

    ## Source
    https://github.com/LINCellularNeuroscience/VAME/issues/26; documentation of `CosineAnnealingLR`.
    """

    code = "SL659"
    title = "schedule runs over"
    severity = "warning"

    def __init__(self) -> None:
        self._moves: Counter[int] = Counter()
        self._last: dict[str, Any] = {}
        self._largest: dict[str, float] = {}
        self._row: Counter[str] = Counter()
        self._told: set[str] = set()

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At a step, or a move of a cosine."""
        if isinstance(event, Schedule) and event.owner and event.owner not in self._told:
            self._moves[id(event.scheduler)] += 1
            self._last[event.owner] = event.scheduler
            yield from self._cosine(event, state)
        elif isinstance(event, Update) and event.rates and event.owner not in self._told:
            yield from self._vanished(event)

    def _cosine(self, event: Schedule, state: LoopState) -> Iterator[Fault]:
        scheduler = event.scheduler  # not every move is told
        times = max(self._moves[id(scheduler)], int(getattr(scheduler, "last_epoch", 0)))
        length = getattr(scheduler, "T_max", 0)
        if type(scheduler).__name__ != "CosineAnnealingLR" or not isinstance(length, int) or length < 2:
            return
        if times < _CYCLES * length or times < 0.9 * state.updates.get(event.owner, 0):
            return
        self._told.add(event.owner)
        yield self.fault(
            f"CosineAnnealingLR of `{event.owner}` was moved {times} times, and its T_max is {length}: the learning "
            f"rate has gone down and up again {times // (2 * length)} times",
            where=f"scheduler CosineAnnealingLR(T_max={length}) of `{event.owner}`",
            why="T_max counts calls of scheduler.step(), which here runs once for each step of the optimizer",
            fix="call scheduler.step() once an epoch, or give T_max the number of steps; CosineAnnealingWarmRestarts "
            "where cycles are meant",
            names=(event.owner,),
        )

    def _vanished(self, event: Update) -> Iterator[Fault]:
        owner, rate = event.owner, max(event.rates)
        self._largest[owner] = max(self._largest.get(owner, 0.0), rate)
        is_nothing = 0 < rate < _NOTHING * self._largest[owner]
        self._row[owner] = self._row[owner] + 1 if is_nothing else 0
        if self._row[owner] != 5 or owner not in self._last:
            return
        self._told.add(owner)
        kind = type(self._last[owner]).__name__
        yield self.fault(
            f"{kind} has taken the learning rate (lr) of `{owner}` from {self._largest[owner]:.3g} to {rate:.3g}",
            where=at(event.site, f"step of `{owner}`"),
            why="at this rate no weight changes any more; a scheduler that is meant for epochs collapses it when it is "
            "stepped on every batch",
            fix="call scheduler.step() once an epoch, with the epoch's mean where it takes a metric; set `min_lr`",
            names=(owner,),
        )


def _settings(scheduler: Any) -> tuple[Any, ...]:
    """What two schedules of the same kind have in common when one is a copy of the other."""
    moving = ("last_epoch", "_step_count", "_last_lr", "best", "num_bad_epochs", "cooldown_counter")
    plain = {k: v for k, v in vars(scheduler).items() if isinstance(v, (int, float, str)) and k not in moving}
    return type(scheduler), tuple(sorted(plain.items()))
