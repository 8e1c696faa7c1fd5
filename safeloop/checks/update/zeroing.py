"""Gradients that are not zeroed, or zeroed before anybody has used them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from safeloop.checks.check import EventCheck
from safeloop.checks.events import Backward, Clip, Event, GradientUse, LoopState, Update, Zero
from safeloop.checks.source import at
from safeloop.checks.update.windows import is_tail, window_of
from safeloop.checks.wording import listed
from safeloop.faults import Fault

_PATIENCE = 3
"""So often must something happen before it counts as a habit of the loop, not an exception in it."""


class GradientsNotZeroed(EventCheck):
    """An optimizer steps on gradients that still hold those of an earlier step.

    ## What it does
    Follows what `.grad` of every parameter holds: which backward passes have added to it, and which of them a step has
    used. Speaks at the second step in a row on a sum of used and new gradients. Every way to zero counts: `zero_grad`
    of optimizer or model, `p.grad = None`, `p.grad.zero_()`, a hook; gradients that the loop writes itself are left
    out. Cost: reads a gradient from the device only where it looks as if nobody had zeroed it.

    ## Why it is bad
    backward() adds to `.grad`. Every step repeats all gradients before it, as momentum without decay would: training
    runs off in old directions, and often still looks as if it learned.

    ## Bad
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(6):
            optimizer.zero_grad  # the parentheses are missing
            F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
            optimizer.step()
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(6):
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
            optimizer.step()
            audit.step()
    ```
    ## Fix
    Call `optimizer.zero_grad()` once for each step: before its first backward pass, or right after the step.

    ## Source
    https://github.com/pytorch/pytorch/issues/47175; https://github.com/yastrebksv/TennisCourtDetector/issues/7.
    """

    code = "SL630"
    title = "gradients not zeroed"

    def __init__(self) -> None:
        self._times: Counter[str] = Counter()

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the second step in a row that adds new gradients to old ones."""
        if not isinstance(event, Update) or event.has_closure or not state.is_known:
            return
        held = {n: state.held[n] for n in sorted(state.owners[event.owner] & state.held.keys())}
        stale = [n for n, h in held.items() if 0 < h.used < len(h.passes) and not h.is_manual]
        self._times[event.owner] = self._times[event.owner] + 1 if stale else 0
        if self._times[event.owner] != 2:
            return
        passes = len(held[stale[0]].passes)
        yield self.fault(
            f"`{event.owner}` stepped on gradients of {passes} backward passes, {held[stale[0]].used} of which earlier "
            f"steps had used: {listed(stale)}",
            where=at(event.site, f"step of `{event.owner}`"),
            why="backward() adds to `.grad`; zero_grad never ran between the steps (`optimizer.zero_grad` without "
            "parentheses does nothing), so every step repeats all gradients before it",
            fix=f"call `{event.owner}.zero_grad()` once before each backward pass, or right after each step",
            names=stale,
        )


class GradientsDiscarded(EventCheck):
    """Gradients are zeroed before any optimizer has used them.

    ## What it does
    Looks, whenever gradients are zeroed, for backward passes in them that nobody has made use of: no step, no line that
    reads or writes `.grad`, no hook, no gradient of an input. Speaks at the third time on the same line, if that line
    throws gradients away at least as often as the optimizer steps. A loop that drops a bad batch now and then is well,
    and so is one that clears what a pass for another optimizer has left: the next pass then reaches nothing else.

    ## Why it is bad
    What backward() adds to `.grad` counts only if a step follows before it is zeroed. Of several losses, or of the
    micro-batches of one accumulation window, only the last one trains; the others cost their time for nothing.

    ## Bad
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for i in range(16):
            optimizer.zero_grad()
            (F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)) / 4).backward()
            if i % 4 == 3:
                optimizer.step()
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for i in range(16):
            (F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)) / 4).backward()
            if i % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
            audit.step()
    ```
    ## Fix
    Zero once, before the first backward pass of a step, not between passes; under accumulation only after the step.

    ## Source
    https://github.com/huggingface/accelerate/issues/1299; https://github.com/bytetriper/RAE/issues/67.
    """

    code = "SL631"
    title = "gradients discarded"

    def __init__(self) -> None:
        self._times: Counter[str] = Counter()
        self._steps: dict[str, int] = {}
        self._last: dict[str, int] = {}
        self._told: set[str] = set()
        self._pending: tuple[frozenset[str], Fault] | None = None
        self._windows: dict[str, list[Backward]] = {}
        self._doubt: tuple[Zero, dict[str, list[Backward]]] | None = None
        """gradients that may have been left by a pass for another optimizer"""

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the third time that zeroing throws away gradients which nobody has stepped on or read."""
        if isinstance(event, Update):
            self._windows[event.owner] = window_of(event.owner, state)
            yield from self._settle(event, state)
        if isinstance(event, (Backward, Update)) and self._doubt is not None:
            (zero, lost), self._doubt = self._doubt, None
            if isinstance(event, Backward) and event.reached & state.owner_of.keys() - zero.parameters:
                self._count(zero, lost, state)
        if not isinstance(event, Zero) or state.inside or not state.is_known:
            return
        lost = _lost(event, state)
        if lost and _are_leftovers(event, lost, state):
            self._doubt = event, lost
        elif lost:
            self._count(event, lost, state)

    def _count(self, event: Zero, lost: dict[str, list[Backward]], state: LoopState) -> None:
        passes = sorted({b.number: b for unused in lost.values() for b in unused}.values(), key=lambda b: b.number)
        if any(is_tail(passes, self._windows.get(owner, ())) for owner in {state.owner_of[name] for name in lost}):
            return  # what an epoch has left: that is another fault
        key = str(event.site)
        if passes[-1].number <= self._last.get(key, -1):
            return
        self._last[key] = passes[-1].number
        self._times[key] += 1
        steps = sum(state.updates.get(owner, 0) for owner in {state.owner_of[name] for name in lost})
        since = steps - self._steps.setdefault(key, steps)
        if key in self._told or self._times[key] < max(_PATIENCE, since):
            return
        self._told.add(key)
        fault = self.fault(
            f"zero_grad threw away the gradients of {_passes(len(passes))} before any "
            f"optimizer had stepped on them: {listed(lost)}",
            where=f"{at(event.site, 'zero_grad')}; the gradients came from {at(passes[-1].site, 'a backward pass')}",
            why="what backward() adds to `.grad` counts only if a step follows before it is zeroed: of several losses, "
            "or of the micro-batches of one accumulation window, only the last one trains",
            fix="zero once, before the first backward pass of a step, not between passes; under accumulation only "
            "after the step",
            names=tuple(lost),
        )
        self._pending = frozenset(lost), fault

    def _settle(self, event: Update, state: LoopState) -> Iterator[Fault]:
        """At the next step of an owner: one that finds no gradient at all is another fault, with another cure."""
        if self._pending is None or state.owners[event.owner].isdisjoint(self._pending[0]):
            return
        (names, fault), self._pending = self._pending, None
        if not names & state.owners[event.owner] <= event.absent:
            yield fault


def _lost(event: Zero, state: LoopState) -> dict[str, list[Backward]]:
    """The parameters whose gradients are thrown away, with the passes that nobody has used."""
    lost: dict[str, list[Backward]] = {}
    useful: dict[int, bool] = {}
    for name in sorted(event.parameters & state.held.keys() & state.owner_of.keys()):
        held = state.held[name]
        if held.is_manual:
            continue
        for passed in held.passes[held.used :]:
            if passed.number not in useful:
                useful[passed.number] = _was_useful(passed, state)
            if not useful[passed.number]:
                lost.setdefault(name, []).append(passed)
    return lost


def _are_leftovers(event: Zero, lost: dict[str, list[Backward]], state: LoopState) -> bool:
    """Whether each pass that is thrown away here is still to be used by another optimizer."""
    zeroed = {state.owner_of[name] for name in event.parameters & state.owner_of.keys()}
    others = [held for name, held in state.held.items() if state.owner_of.get(name, "") not in {"", *zeroed}]
    waiting = {passed.number for held in others if not held.is_manual for passed in held.passes[held.used :]}
    return all(passed.number in waiting for unused in lost.values() for passed in unused)


def _passes(number: int) -> str:
    return "a backward pass" if number == 1 else f"{number} backward passes"


def _was_useful(passed: Backward, state: LoopState) -> bool:
    """Whether somebody made use of a pass: a step, a line that reads `.grad`, a measured norm, an input's gradient."""
    if passed.reaches_inputs or passed.makes_graph or passed not in state.recent:
        return True
    after = state.recent[state.recent.index(passed) + 1 :]
    return any(
        isinstance(later, (Update, GradientUse)) or (isinstance(later, Clip) and later.limit == float("inf"))
        for later in after
    )
