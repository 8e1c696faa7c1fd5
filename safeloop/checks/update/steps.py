"""Optimizers that never step, and parameters that move although they should not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from safeloop.checks.check import EventCheck
from safeloop.checks.events import Backward, Event, Iteration, LoopState, Update
from safeloop.checks.source import at
from safeloop.checks.wording import listed
from safeloop.faults import Fault

_ENOUGH = 5
"""Iterations after which an optimizer that was never stepped has been forgotten, where the watch ends."""
_SURELY = 40


class OptimizerNeverSteps(EventCheck):
    """Gradients are computed for an optimizer that is never stepped.

    ## Source
    https://github.com/huggingface/accelerate/issues/2665; https://github.com/pytorch/pytorch/issues/149205.
    """

    code = "SL635"
    title = "optimizer never steps"

    def __init__(self) -> None:
        self._passes: Counter[str] = Counter()
        self._told: set[str] = set()

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """Where another optimizer was stepped 40 times and this one never."""
        if isinstance(event, Backward):
            for owner, names in state.owners.items():
                self._passes[owner] += not names.isdisjoint(event.reached)
        if isinstance(event, Update) and event.was_skipped:
            self._told.add(event.owner)  # a gradient scaler keeps it from stepping: that is another fault
        if isinstance(event, Iteration) and max(state.updates.values(), default=0) >= _SURELY:
            yield from self._never(state)

    def close(self, state: LoopState) -> Iterator[Fault]:
        """Where the watch ends, and at least 5 backward passes were for nothing."""
        yield from self._never(state)

    def _never(self, state: LoopState) -> Iterator[Fault]:
        for owner, names in state.owners.items():
            if state.updates.get(owner) or owner in self._told or self._passes[owner] < _ENOUGH:
                continue
            self._told.add(owner)
            last = next(iter(state.last_update.values()), None)
            others = ", ".join(f"`{other}` {count} times" for other, count in state.updates.items())
            yield self.fault(
                f"optimizer `{owner}` was never stepped, though {self._passes[owner]} backward passes reached its "
                f"parameters {listed(sorted(names))}" + (f"; stepped were {others}" if others else ""),
                where=f"{at(last.site, '')} steps `{last.owner}`" if last is not None else f"optimizer `{owner}`",
                why="its gradients are computed and never applied: these parameters keep their initial values",
                fix=f"call `{owner}.step()` after its backward pass; look for another optimizer that is stepped twice",
                names=sorted(names),
            )


class UpdatedWithoutPart(EventCheck):
    """A parameter that took no part in the step is moved all the same, by weight decay or momentum.

    ## Source
    https://github.com/megvii-model/DetNAS/issues/3.
    """

    code = "SL636"
    title = "updated without taking part"
    severity = "warning"

    def __init__(self) -> None:
        self._times: Counter[str] = Counter()
        self._names: dict[str, set[str]] = {}

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the third step with a zero gradient that no backward pass has written, where the optimizer still moves."""
        if not isinstance(event, Update) or not event.is_deep or not state.is_known or event.has_closure:
            return
        optimizer = state.optimizers[event.owner]
        if not _moves_without_gradient(optimizer):
            return
        idle = {n for n in event.zero if n in state.held and not state.held[n].passes and not state.held[n].is_manual}
        if not idle:
            return
        self._names.setdefault(event.owner, set()).update(idle)
        self._times[event.owner] += 1
        if self._times[event.owner] != 3:
            return
        names = sorted(self._names[event.owner])
        yield self.fault(
            f"{listed(names)} took no part in some steps, and `{event.owner}` moved them all the same",
            where=at(event.site, f"step of `{event.owner}`"),
            why="their gradient is zero, not None: zero_grad(set_to_none=False) keeps it, and weight decay and momentum "
            "act on every parameter that has one",
            fix="leave `set_to_none` at its default (True): a parameter without a gradient is left alone",
            names=names,
        )


def _moves_without_gradient(optimizer: Any) -> bool:
    keys = ("weight_decay", "momentum", "betas")
    return any(bool(group.get(key)) for group in optimizer.param_groups for key in keys)


class FrozenButMoving(EventCheck):
    """A parameter is frozen, and its optimizer goes on moving it.

    ## Source
    https://github.com/pytorch/pytorch/issues/1266; documentation of `torch.optim.Optimizer.zero_grad`.
    """

    code = "SL651"
    title = "frozen but moving"
    severity = "warning"

    def __init__(self) -> None:
        self._times: Counter[str] = Counter()

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the third step on a gradient of a parameter that no longer requires grad."""
        if not isinstance(event, Update) or event.was_skipped:
            return
        names = sorted(event.frozen_with_gradient)
        if not names:
            return
        self._times[event.owner] += 1
        if self._times[event.owner] == 3:
            yield self.fault(
                f"{listed(names)} do not require grad, and still hold a gradient: every step of `{event.owner}` moves "
                "them",
                where=at(event.site, f"step of `{event.owner}`"),
                why="`requires_grad_(False)` stops new gradients; the last one stays in `.grad`, and momentum and weight "
                "decay act on it",
                fix="set their `.grad` to None when you freeze them, or take them out of the optimizer",
                names=names,
            )


class FrozenDuringTraining(EventCheck):
    """Parameters that were trained are frozen in the middle, and stay frozen.

    ## Source
    https://github.com/Lightning-AI/pytorch-lightning/pull/5574.
    """

    code = "SL650"
    title = "frozen during training"
    severity = "warning"

    def __init__(self) -> None:
        self._since: dict[str, int] = {}
        self._first: dict[str, int] = {}
        self._trained: set[str] = set()
        self._was_told = False

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """After 10 iterations without them."""
        if isinstance(event, Update):
            self._trained |= state.owners[event.owner] - event.absent - event.frozen
            for name in event.frozen & self._trained:
                self._since[name] = self._since.get(name, 0) + 1
                self._first.setdefault(name, event.iteration)
            for name in state.owners[event.owner] - event.frozen:
                self._since.pop(name, None)
                self._first.pop(name, None)
        if isinstance(event, Iteration):
            yield from self._stay(10)

    def close(self, state: LoopState) -> Iterator[Fault]:
        """Where the watch ends with parameters that were frozen for at least 3 steps."""
        yield from self._stay(3)

    def _stay(self, patience: int) -> Iterator[Fault]:
        names = sorted(name for name, times in self._since.items() if times >= patience)
        if self._was_told or not names:
            return
        self._was_told = True
        yield self.fault(
            f"{listed(names)} were trained until iteration {self._first[names[0]]}, then frozen, and never trained again",
            where=f"iteration {self._first[names[0]]}",
            why="something set `requires_grad` to False during training (a probe, an alternating phase) and did not "
            "restore it",
            fix="restore `requires_grad_(True)` after the phase, in `finally`; accept this warning where they are "
            "frozen on purpose",
            names=names,
        )
