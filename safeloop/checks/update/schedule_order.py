"""Learning-rate schedules that move at the wrong moment, or end at zero."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from safeloop.checks.check import EventCheck
from safeloop.checks.events import Backward, Event, LoopState, Schedule, Update
from safeloop.checks.source import at
from safeloop.faults import Fault


class ScheduleBeforeStep(EventCheck):
    """A learning-rate schedule is moved before the step that it should follow.

    ## What it does
    Looks, at each step, whether the schedule of that optimizer was moved since the backward pass that the step is for.
    Speaks at the second such step. A schedule that is moved before the backward pass, as at the head of an epoch, is
    well.

    ## Why it is bad
    The first learning rate of the schedule is never used, and every later one comes a step too early: a warm-up begins
    too high, and a drop by milestones falls in the wrong place.

    ## Bad
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        optimizer.step()  # quiets the warning of PyTorch
        for _ in range(6):
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
            scheduler.step()
            optimizer.step()
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(6):
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
            optimizer.step()
            scheduler.step()
            audit.step()
    ```
    ## Fix
    Call the scheduler's step() after the optimizer's.

    ## Source
    https://github.com/deepspeedai/DeepSpeed/issues/1120; documentation of `torch.optim`, "How to adjust learning rate".
    """

    code = "SL645"
    title = "scheduler before optimizer"

    def __init__(self) -> None:
        self._times: Counter[str] = Counter()

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the second step with a move of its schedule since the backward pass that it steps for."""
        if not isinstance(event, Update) or event.was_skipped or event.has_closure or not state.is_known:
            return
        moved = _moved_since_backward(event.owner, state)
        if moved is None:
            return
        self._times[event.owner] += 1
        if self._times[event.owner] != 2:
            return
        kind = type(moved.scheduler).__name__
        yield self.fault(
            f"lr_scheduler.step() of {kind} ran between the backward pass and the step of `{event.owner}`",
            where=at(event.site, f"before the step of `{event.owner}`"),
            why="the first learning rate of the schedule is never used, and every later one comes a step too early",
            fix=f"call the scheduler's step() after `{event.owner}.step()`",
            names=(event.owner,),
        )


def _moved_since_backward(owner: str, state: LoopState) -> Schedule | None:
    """The move of an owner's schedule since the last backward pass that reached it; None for none."""
    moved = None
    for earlier in reversed(state.recent):
        if isinstance(earlier, Schedule) and earlier.owner == owner:
            moved = earlier
        if isinstance(earlier, Update) and earlier.owner == owner:
            return None
        if isinstance(earlier, Backward) and not state.owners[owner].isdisjoint(earlier.reached):
            return moved
    return None


_CYCLES = ("CosineAnnealingLR", "CosineAnnealingWarmRestarts", "CyclicLR")
"""Schedules that pass through their lowest rate and rise again"""


class LearningRateZero(EventCheck):
    """The learning rate of an optimizer has become exactly zero.

    ## What it does
    Looks at the learning rates of each optimizer at each step. Speaks where all of them are exactly 0 for 5 steps in a
    row after a positive one, or for the first 10 steps. Where another optimizer goes on training, or a cosine or a
    cycle will bring the rate back, it waits for the end of the watch: a part may rest for a phase.

    ## Why it is bad
    Nothing trains any more, at full cost. A schedule has taken the rate to zero: a gamma of 0, a decay that is over, a
    move for each batch where one for each epoch was meant.

    ## Bad
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.0)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(10):
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
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.1)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(10):
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
            optimizer.step()
            scheduler.step()
            audit.step()
    ```
    ## Fix
    Correct the schedule, or end the run where it ends.

    ## Source
    https://github.com/LINCellularNeuroscience/VAME/issues/26.
    """

    code = "SL647"
    title = "learning rate is zero"

    def __init__(self) -> None:
        self._row: Counter[str] = Counter()
        self._since: dict[str, Update] = {}
        self._was_positive: set[str] = set()
        self._told: set[str] = set()
        self._comes_back: set[str] = set()

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the fifth step in a row after the rate has fallen to zero, or the tenth from the start."""
        if isinstance(event, Schedule) and type(event.scheduler).__name__ in _CYCLES:
            self._comes_back.add(event.owner)
        if not isinstance(event, Update) or not event.rates:
            return
        owner = event.owner
        if any(event.rates):
            self._was_positive.add(owner)
            self._row[owner] = 0
            return
        self._row[owner] += 1
        if self._row[owner] == 1:
            self._since[owner] = event
        others = state.updates.keys() - {owner}
        if all(self._row[other] for other in others) and owner not in self._comes_back:
            yield from self._zero(owner)

    def close(self, state: LoopState) -> Iterator[Fault]:
        """Where the watch ends with a rate of zero."""
        for owner in list(self._row):
            yield from self._zero(owner)

    def _zero(self, owner: str) -> Iterator[Fault]:
        if owner in self._told or self._row[owner] < (5 if owner in self._was_positive else 10):
            return
        self._told.add(owner)
        first = self._since[owner]
        fell = owner in self._was_positive
        yield self.fault(
            f"every learning rate (lr) of `{owner}` is exactly 0 since iteration {first.iteration}",
            where=at(first.site, f"step of `{owner}`"),
            why="a schedule has taken it to zero (a gamma of 0, a decay that is over, a step per batch where one per "
            "epoch was meant), and nothing trains any more"
            if fell
            else "it was never anything else: an integer division, the state of a run that was over, or a warm-up from "
            "0 whose scheduler is never stepped; nothing trains",
            fix="correct the schedule, or end the run where it ends"
            if fell
            else "print `optimizer.param_groups[0]['lr']` before the loop and find out who sets it; call the "
            "scheduler's step() after each step",
            names=(owner,),
        )
