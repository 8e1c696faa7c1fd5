"""Learning-rate schedules that move at the wrong moment, or the wrong optimizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from safeloop.checks.check import EventCheck
from safeloop.checks.events import Backward, Event, LoopState, Schedule, Update
from safeloop.checks.source import at
from safeloop.faults import Fault


class ScheduleBeforeStep(EventCheck):
    """A learning-rate schedule is moved before the step that it should follow.

    ## Source
    https://github.com/deepspeedai/DeepSpeed/issues/1120; documentation of `torch.optim`, "How to adjust learning rate".
    """

    code = "SL645"
    title = "scheduler before optimizer"

    def __init__(self) -> None:
        self._times: Counter[str] = Counter()

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the second step with a move of its schedule since the backward pass that it steps for."""
        if not isinstance(event, Update):
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
    for earlier in reversed(state.recent):
        if isinstance(earlier, Schedule) and earlier.owner == owner:
            return earlier
        if isinstance(earlier, Update) and earlier.owner == owner:
            return None
        if isinstance(earlier, Backward) and not state.owners[owner].isdisjoint(earlier.reached):
            return None
    return None


class ScheduleOfAnotherOptimizer(EventCheck):
    """A schedule moves an optimizer that is not the one that steps.

    ## Source
    https://github.com/nianticlabs/manydepth/issues/46.
    """

    code = "SL646"
    title = "schedule of another optimizer"
    severity = "warning"

    def __init__(self) -> None:
        self._times: Counter[int] = Counter()

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the second move of a schedule whose optimizer shares parameters with a watched one, and never steps."""
        if not isinstance(event, Schedule) or event.owner or event.was_updated:
            return
        self._times[id(event.scheduler)] += 1
        if self._times[id(event.scheduler)] != 2 or not state.updates:
            return
        kind = type(event.scheduler).__name__
        theirs = {id(p) for group in event.scheduler.optimizer.param_groups for p in group["params"]}
        owner = next(
            name
            for name, optimizer in state.optimizers.items()
            if any(id(p) in theirs for group in optimizer.param_groups for p in group["params"])
        )
        yield self.fault(
            f"{kind} moves the learning rate of an old optimizer that is never stepped; `{owner}`, which steps, holds "
            "the same parameters and keeps its rate",
            where=at(event.site, f"schedule {kind}"),
            why="the optimizer was re-created after the scheduler had been built for it: a scheduler holds the object "
            "that it was given",
            fix="build the scheduler after the optimizer, and again whenever the optimizer is built again",
            names=(owner,),
        )


class LearningRateZero(EventCheck):
    """The learning rate of an optimizer has become exactly zero.

    ## Source
    https://github.com/LINCellularNeuroscience/VAME/issues/26.
    """

    code = "SL647"
    title = "learning rate is zero"

    def __init__(self) -> None:
        self._row: Counter[str] = Counter()
        self._since: dict[str, int] = {}
        self._was_positive: set[str] = set()

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the third step in a row after the rate has fallen to zero, or the tenth from the start."""
        if not isinstance(event, Update) or not event.rates:
            return
        if any(event.rates):
            self._was_positive.add(event.owner)
            self._row[event.owner] = 0
            return
        self._row[event.owner] += 1
        if self._row[event.owner] == 1:
            self._since[event.owner] = event.iteration
        if self._row[event.owner] != (3 if event.owner in self._was_positive else 10):
            return
        yield self.fault(
            f"every learning rate (lr) of `{event.owner}` is exactly 0 since iteration {self._since[event.owner]}",
            where=at(event.site, f"step of `{event.owner}`"),
            why="a schedule has taken it to zero (a gamma of 0, a decay that is over, a step per batch where one per "
            "epoch was meant), and nothing trains any more",
            fix="correct the schedule, or end the run where it ends",
            names=(event.owner,),
        )
