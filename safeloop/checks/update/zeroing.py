"""Gradients that are zeroed too late, too early, or not at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from safeloop.checks.check import EventCheck
from safeloop.checks.events import Backward, Event, GradientUse, LoopState, Update, Zero
from safeloop.checks.source import at
from safeloop.checks.wording import counted, listed
from safeloop.faults import Fault

_PATIENCE = 3
"""So often must something happen before it counts as a habit of the loop, not an exception in it."""


class GradientsNotZeroed(EventCheck):
    """An optimizer steps on gradients that still hold those of an earlier step.

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

    ## Source
    https://github.com/huggingface/accelerate/issues/1299; https://github.com/bytetriper/RAE/issues/67.
    """

    code = "SL631"
    title = "gradients discarded"

    def __init__(self) -> None:
        self._times: Counter[str] = Counter()

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the third time that zeroing throws away gradients which nobody has stepped on or read."""
        if not isinstance(event, Zero) or state.inside or not state.is_known:
            return
        lost: dict[str, list[Backward]] = {}
        for name in sorted(event.parameters & state.held.keys()):
            held = state.held[name]
            if name in state.owner_of and not held.is_manual:
                unused = [b for b in held.passes[held.used :] if not _was_useful(b, state)]
                if unused:
                    lost[name] = unused
        if not lost:
            return
        key = str(event.site)
        self._times[key] += 1
        if self._times[key] != _PATIENCE:
            return
        passes = sorted({b.number: b for unused in lost.values() for b in unused}.values(), key=lambda b: b.number)
        yield self.fault(
            f"zero_grad threw away the gradients of {_passes(len(passes))} before any "
            f"optimizer had stepped on them: {listed(lost)}",
            where=f"{at(event.site, 'zero_grad')}; the gradients came from {at(passes[-1].site, 'a backward pass')}",
            why="what backward() adds to `.grad` counts only if a step follows before it is zeroed: of several losses, "
            "or of the micro-batches of one accumulation window, only the last one trains",
            fix="zero once, before the first backward pass of a step, not between passes; under accumulation only after "
            "the step",
            names=tuple(lost),
        )


def _passes(number: int) -> str:
    return "a backward pass" if number == 1 else f"{number} backward passes"


def _was_useful(passed: Backward, state: LoopState) -> bool:
    """Whether somebody made use of a pass: a step, a line that reads `.grad`, or the gradient of an input."""
    if passed.reaches_inputs or passed.makes_graph:
        return True
    if passed not in state.recent:
        return True
    after = state.recent[state.recent.index(passed) + 1 :]
    return any(isinstance(later, (Update, GradientUse)) for later in after)


class StepWithoutGradients(EventCheck):
    """An optimizer steps when none of its parameters has a gradient.

    ## Source
    https://github.com/bytetriper/RAE/issues/67; https://github.com/pytorch/tutorials/pull/52.
    """

    code = "SL632"
    title = "step without gradients"

    def __init__(self) -> None:
        self._times: Counter[str] = Counter()

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the third step of an optimizer, if it never had a gradient."""
        if not isinstance(event, Update) or event.has_closure or event.was_skipped:
            return
        names = state.owners[event.owner]
        if not names or event.absent != names:
            self._times[event.owner] = -(10**9)
            return
        self._times[event.owner] += 1
        if self._times[event.owner] != _PATIENCE:
            return
        what, why, fix = _cause(event, state)
        yield self.fault(
            f"none of the {counted(len(names), 'parameter')} of `{event.owner}` had a gradient at any of its "
            f"{_PATIENCE} steps{what}",
            where=at(event.site, f"step of `{event.owner}`"),
            why=why,
            fix=fix,
            names=sorted(names),
        )


def _cause(event: Update, state: LoopState) -> tuple[str, str, str]:
    owned = state.owners[event.owner]
    before = [e for e in state.recent if isinstance(e, (Backward, Zero, Update))]
    passes = [i for i, e in enumerate(before) if isinstance(e, Backward) and e.reached & owned]
    if not passes:
        return (
            "; no backward pass reached them",
            "the losses do not depend on these parameters, or backward() is never called",
            "look for a detach() or no_grad between them and the loss, or hand the optimizer the model that is trained",
        )
    later = before[passes[-1] + 1 :]
    steps = [i for i, e in enumerate(later) if isinstance(e, Update) and e.owner == event.owner]
    zeros = [e for i, e in enumerate(later) if isinstance(e, Zero) and e.parameters & owned]
    if zeros and not steps:
        return (
            f"; zero_grad ran between backward and step, {at(zeros[-1].site, '')}",
            "zero_grad() after backward() throws the gradients away, so the step finds none",
            "call zero_grad() before backward(), or after step(): zero_grad, backward, step",
        )
    return (
        "; backward ran after the step",
        "step() stands before backward(): by the next step zero_grad() has thrown those gradients away",
        "call backward() before step(): zero_grad, backward, step",
    )


class SteppedAgain(EventCheck):
    """An optimizer steps a second time on gradients that it has used already.

    ## Source
    https://github.com/huggingface/accelerate/issues/2665.
    """

    code = "SL638"
    title = "stepped twice on the same gradients"
    severity = "warning"

    def __init__(self) -> None:
        self._times: Counter[str] = Counter()

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the third step that finds no new gradient, with an earlier step's still there."""
        if not isinstance(event, Update) or event.has_closure or event.was_skipped or not state.is_known:
            return
        held = {n: state.held[n] for n in state.owners[event.owner] & state.held.keys()}
        old = sorted(n for n, h in held.items() if h.used and h.used == len(h.passes) and not h.is_manual)
        if not old or any(len(h.passes) > h.used for h in held.values()):
            return
        self._times[event.owner] += 1
        if self._times[event.owner] == _PATIENCE:
            yield self.fault(
                f"`{event.owner}` stepped again on gradients that its step before had used, without a backward pass "
                f"between: {listed(old)}",
                where=at(event.site, f"step of `{event.owner}`"),
                why="the same gradient is applied twice, at weights for which it was not computed",
                fix="step once after each backward pass; if another optimizer was meant, step that one",
                names=old,
            )
