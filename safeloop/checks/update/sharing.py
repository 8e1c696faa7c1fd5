"""Gradients that reach an optimizer from a loss that was not meant for it, or twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from safeloop.checks.check import EventCheck
from safeloop.checks.events import Backward, Event, LoopState, Update, Zero
from safeloop.checks.source import at
from safeloop.checks.wording import listed
from safeloop.faults import Fault


class GradientsMixed(EventCheck):
    """An optimizer steps on gradients of a loss that another optimizer has already stepped for.

    ## Source
    https://github.com/FoundationVision/OmniTokenizer/issues/15; https://github.com/deepspeedai/DeepSpeed/issues/399.
    """

    code = "SL633"
    title = "gradients of two losses mixed"

    def __init__(self) -> None:
        self._times: Counter[str] = Counter()

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the second step of an owner on passes between which another owner was stepped."""
        if not isinstance(event, Update) or event.has_closure or not state.is_known or len(state.owners) < 2:
            return
        owned = state.owners[event.owner] & state.held.keys()
        fresh = {n: state.held[n].passes[state.held[n].used :] for n in sorted(owned) if not state.held[n].is_manual}
        mixed = {name: passes for name, passes in fresh.items() if _between(passes, event.owner, state)}
        if not mixed:
            return
        self._times[event.owner] += 1
        if self._times[event.owner] != 2:
            return
        name, passes = next(iter(mixed.items()))
        other = _between(passes, event.owner, state)
        assert other is not None
        yield self.fault(
            f"`{event.owner}` steps on gradients of two losses, and `{other.owner}` was stepped between them: "
            f"{listed(mixed)}",
            where=f"{at(event.site, 'its step')}; the first backward pass: {at(passes[0].site, 'unknown')}; the last: "
            f"{at(passes[-1].site, 'unknown')}",
            why=f"the loss that `{other.owner}` is trained by also reaches `{event.owner}`: what it left in `.grad` is "
            "applied together with the loss that was meant",
            fix=f"detach what `{event.owner}` made before it enters the loss of `{other.owner}`, or call "
            f"`{event.owner}.zero_grad()` right before its own backward pass",
            names=tuple(mixed),
        )


def _between(passes: list[Backward], owner: str, state: LoopState) -> Update | None:
    """A step of another owner between two passes that begin on different lines."""
    if len(passes) < 2 or len({p.site for p in passes}) < 2:
        return None
    numbers = {id(e): i for i, e in enumerate(state.recent)}
    if id(passes[0]) not in numbers or id(passes[-1]) not in numbers:
        return None
    for event in state.recent[numbers[id(passes[0])] + 1 : numbers[id(passes[-1])]]:
        if isinstance(event, Update) and event.owner != owner and passes[0].reached & state.owners[event.owner]:
            return event
    return None


class LossCountedTwice(EventCheck):
    """A loss is differentiated alone, and again as a part of a sum.

    ## Source
    https://github.com/ueoo/AGIS-Net/issues/8.
    """

    code = "SL634"
    title = "loss counted twice"
    severity = "warning"

    def __init__(self) -> None:
        self._times = 0

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the second pass whose graph holds the loss of an earlier pass that is still in `.grad`."""
        if not isinstance(event, Backward) or event.makes_graph or not state.is_known:
            return
        still = {b.number: b for name in event.reached & state.held.keys() for b in state.held[name].passes}
        twice = [b for b in still.values() if b.root in event.visited and not b.makes_graph]
        if not twice:
            return
        self._times += 1
        if self._times == 2:
            first = twice[0]
            yield self.fault(
                "a loss was differentiated by itself, and then once more as a part of another: its gradient is in "
                f"`.grad` twice, for {listed(sorted(event.reached & first.reached))}",
                where=f"{at(event.site, 'a backward pass')}; before it, with retain_graph=True: "
                f"{at(first.site, 'a backward pass')}",
                why="backward() adds to `.grad`, and the second loss contains the first",
                fix="call backward() once, on the sum of the losses",
                names=sorted(event.reached & first.reached),
            )


class ClosureKeepsGradients(EventCheck):
    """The closure of LBFGS does not zero the gradients, so that they add up over its evaluations.

    ## Source
    Documentation of `torch.optim.LBFGS` and of `Optimizer.step(closure)`.
    """

    code = "SL637"
    title = "closure keeps gradients"

    def __init__(self) -> None:
        self._was_told = False

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the second evaluation inside one step, if nothing was zeroed in this step."""
        owner = state.inside
        if self._was_told or not owner or not isinstance(event, Backward) or not state.is_known:
            return
        if type(state.optimizers.get(owner)).__name__ != "LBFGS":
            return
        start = max((i for i, e in enumerate(state.recent) if isinstance(e, Update) and e.owner == owner), default=-1)
        inside = state.recent[start + 1 :]
        before = [e for e in inside if isinstance(e, Backward) and e.site == event.site]
        if not before or any(isinstance(e, Zero) for e in inside):
            return
        self._was_told = True
        yield self.fault(
            f"the closure of `{owner}` ran backward again without zero_grad: its gradients add up over the evaluations "
            "of one step",
            where=at(event.site, f"closure of `{owner}`"),
            why="LBFGS evaluates the closure several times in one step and takes `.grad` for the gradient at each point",
            fix=f"begin the closure with `{owner}.zero_grad()`",
            names=sorted(event.reached),
        )
