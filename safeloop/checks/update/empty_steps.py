"""Steps that find no gradient, or none that is new."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from safeloop.checks.check import EventCheck
from safeloop.checks.events import Backward, Event, Iteration, LoopState, Update, Zero
from safeloop.checks.source import at
from safeloop.checks.wording import counted, listed
from safeloop.faults import Fault

_PATIENCE = 3
"""So often must something happen before it counts as a habit of the loop, not an exception in it."""


class StepWithoutGradients(EventCheck):
    """An optimizer steps when none of its parameters has a gradient.

    ## What it does
    Looks at every step for an optimizer all of whose gradients are None, and speaks at the third such step if it never
    had one. Where no backward pass has reached its parameters at all, as with a loss that is switched on later, it
    waits for the end of the watch. Parameters that are frozen at the moment do not count.

    ## Why it is bad
    A step without gradients does nothing, and says nothing: the loss does not move, for a reason that no error shows.
    zero_grad() between backward and step is the usual one, a step before its backward pass another.

    ## Bad
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(6):
            loss = F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1))
            loss.backward()
            optimizer.zero_grad()
            optimizer.step()
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(6):
            loss = F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            audit.step()
    ```
    ## Fix
    Keep the order zero_grad, backward, step.

    ## Source
    https://github.com/bytetriper/RAE/issues/67; https://github.com/pytorch/tutorials/pull/52.
    """

    code = "SL632"
    title = "step without gradients"

    def __init__(self) -> None:
        self._times: Counter[str] = Counter()
        self._had: set[str] = set()
        self._waiting: dict[str, Update] = {}

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the third step of an optimizer, if it never had a gradient."""
        if not isinstance(event, Update) or event.has_closure or event.was_skipped or event.owner in self._had:
            return
        names = state.owners[event.owner]
        if event.absent != names:
            self._had.add(event.owner)
            self._waiting.pop(event.owner, None)
            return
        if event.frozen == names or not state.is_known:
            return
        self._times[event.owner] += 1
        if self._times[event.owner] < _PATIENCE:
            return
        cause = _cause(event, state)
        if cause is None:
            self._waiting[event.owner] = event
            return
        self._had.add(event.owner)
        yield self._fault(event, state, *cause)

    def close(self, state: LoopState) -> Iterator[Fault]:
        """Where the watch ends and no backward pass has ever reached a parameter of an optimizer that was stepped."""
        for event in self._waiting.values():
            yield self._fault(
                event,
                state,
                "; no backward pass reached them",
                "the losses do not depend on these parameters, or backward() is never called",
                "look for a detach() or no_grad between them and the loss, or hand the optimizer the model that is "
                "trained",
            )
        self._waiting.clear()

    def _fault(self, event: Update, state: LoopState, what: str, why: str, fix: str) -> Fault:
        names = state.owners[event.owner]
        return self.fault(
            f"none of the {counted(len(names), 'parameter')} of `{event.owner}` had a gradient at any of its "
            f"{self._times[event.owner]} steps{what}",
            where=at(event.site, f"step of `{event.owner}`"),
            why=why,
            fix=fix,
            names=sorted(names),
        )


def _cause(event: Update, state: LoopState) -> tuple[str, str, str] | None:
    """What, why and fix, from the order of the last events; None where no backward pass was for this optimizer."""
    owned = state.owners[event.owner]
    before = [e for e in state.recent if isinstance(e, (Backward, Zero, Update))]
    passes = [i for i, e in enumerate(before) if isinstance(e, Backward) and e.reached & owned]
    if not passes:
        return None
    later = before[passes[-1] + 1 :]
    zeros = [e for e in later if isinstance(e, Zero) and e.parameters & owned]
    if zeros and not any(isinstance(e, Update) and e.owner == event.owner for e in later):
        return (
            f"; zero_grad ran between backward and step, {at(zeros[-1].site, 'unknown')}",
            "zero_grad() after backward() throws the gradients away, so the step finds none",
            "call zero_grad() before backward(), or after step(): zero_grad, backward, step",
        )
    return (
        "; backward ran after the step",
        "step() stands before backward(): by the next step zero_grad() has thrown those gradients away",
        "call backward() before step(): zero_grad, backward, step",
    )


class ClosureDiscardsGradients(EventCheck):
    """The closure of a step zeroes the gradients after its backward pass, so that the step finds none.

    ## What it does
    Looks whether the last thing that happens to gradients inside a step with a closure is that they are zeroed, and
    speaks at the second such step.

    ## Why it is bad
    `optimizer.step(closure)` reads `.grad` when the closure has returned. LBFGS takes a gradient of zeros for a minimum
    and stops: the loss stays where it is, without an error.

    ## Bad
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    x, y = torch.randn(16, 4), torch.randn(16, 1)

    def closure():
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.zero_grad()
        return loss

    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(3):
            optimizer.step(closure)
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    x, y = torch.randn(16, 4), torch.randn(16, 1)

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(3):
            optimizer.step(closure)
            audit.step()
    ```
    ## Fix
    Begin the closure with `optimizer.zero_grad()`, and end it with backward().

    ## Source
    Documentation of `Optimizer.step(closure)`.
    """

    code = "SL654"
    title = "closure discards its gradients"

    def __init__(self) -> None:
        self._last: dict[str, Event] = {}
        self._times: Counter[str] = Counter()

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the next step, or the end of the iteration, after a second closure that ended so."""
        if state.inside:
            if isinstance(event, (Backward, Zero)):
                self._last[state.inside] = event
            return
        if isinstance(event, (Update, Iteration)):
            for owner, last in self._last.items():
                if isinstance(last, Zero) and state.owners[owner] <= last.parameters:
                    self._times[owner] += 1
                    if self._times[owner] == 2:
                        yield self._fault(owner, last)
            self._last.clear()

    def _fault(self, owner: str, last: Event) -> Fault:
        return self.fault(
            f"the closure of `{owner}` calls zero_grad after backward: the step finds no gradient",
            where=at(last.site, f"closure of `{owner}`"),
            why="step(closure) reads `.grad` when the closure has returned; LBFGS takes zeros for a minimum and stops",
            fix="begin the closure with zero_grad(), and end it with backward()",
            names=(owner,),
        )


class SteppedAgain(EventCheck):
    """An optimizer steps a second time on gradients that it has used already.

    ## What it does
    Looks for a step whose gradients all come from backward passes that an earlier step has used, and speaks at the
    third one. Gradients that the loop writes itself, and steps with a closure, are left out.

    ## Why it is bad
    The same gradient is applied twice, at weights for which it was not computed, and counts twice in every moment that
    the optimizer keeps. Often another optimizer was meant, which then is never stepped.

    ## Bad
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(6):
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
            optimizer.step()
            optimizer.step()
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(6):
            for _ in range(2):
                optimizer.zero_grad()
                F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
                optimizer.step()
            audit.step()
    ```
    ## Fix
    Step once after each backward pass; if another optimizer was meant, step that one.

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
        old = sorted(n for n, h in held.items() if h.used and not h.is_manual and n not in event.absent | event.zero)
        if not old or any(len(h.passes) > h.used or h.is_manual for h in held.values()):
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
