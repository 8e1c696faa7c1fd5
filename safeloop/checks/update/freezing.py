"""Parameters that are frozen while the loop runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from safeloop.checks.check import EventCheck
from safeloop.checks.events import Backward, Event, LoopState, Update, Zero
from safeloop.checks.source import at
from safeloop.checks.update.steps import moves_without_gradient
from safeloop.checks.wording import agree, listed
from safeloop.faults import Fault


class FrozenButMoving(EventCheck):
    """A parameter is frozen, and its optimizer goes on moving it.

    ## What it does
    Looks, at each step, for parameters with `requires_grad=False` whose `.grad` is still there. Speaks at the third
    step that moves them: with the very gradient of the step before, or with zeros that momentum or weight decay act on.

    ## Why it is bad
    `requires_grad_(False)` stops new gradients. The last one stays in `.grad`, or zeros do after
    `zero_grad(set_to_none=False)`, and an optimizer moves every parameter that has a gradient: what was meant to stand
    still drifts.

    ## Bad
    ```python
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for i in range(10):
            model[0].requires_grad_(i < 2 or i > 7)
            optimizer.zero_grad(set_to_none=False)
            F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
            optimizer.step()
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for i in range(10):
            model[0].requires_grad_(i < 2 or i > 7)
            optimizer.zero_grad()  # sets them to None
            F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
            optimizer.step()
            audit.step()
    ```
    ## Fix
    Set their `.grad` to None when you freeze them, or take them out of the optimizer.

    ## Source
    https://github.com/pytorch/pytorch/issues/1266; documentation of `torch.optim.Optimizer.zero_grad`.
    """

    code = "SL651"
    title = "frozen but moving"
    severity = "warning"

    def __init__(self) -> None:
        self._times: Counter[str] = Counter()
        self._seen: dict[str, tuple[int, int]] = {}
        self._trained: set[str] = set()

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the third step that moves a parameter which does not require grad."""
        if not isinstance(event, Update) or event.was_skipped or event.has_closure:
            return
        self._trained |= state.owners[event.owner] - event.absent - event.frozen
        names = sorted(self._moved(event, state)) if event.frozen_with_gradient else []
        if not names:
            return
        self._times[event.owner] += 1
        if self._times[event.owner] == 3:
            yield self.fault(
                f"{listed(names)} {agree(len(names), 'does', 'do')} not require grad, with a gradient still there: "
                f"every step of `{event.owner}` moves {agree(len(names), 'it', 'them')}",
                where=at(event.site, f"step of `{event.owner}`"),
                why="`requires_grad_(False)` stops new gradients; the last one stays in `.grad`, and momentum and "
                "weight decay act on it",
                fix="set their `.grad` to None when you freeze them, or take them out of the optimizer",
                names=names,
            )

    def _moved(self, event: Update, state: LoopState) -> Iterator[str]:
        movers = moves_without_gradient(state.optimizers[event.owner], self._trained, state.name_of)
        parameters = {
            state.name_of.get(id(p)): p for g in state.optimizers[event.owner].param_groups for p in g["params"]
        }
        for name in event.frozen_with_gradient:
            gradient = parameters[name].grad
            if name in event.zero:
                if name in movers:
                    yield name
                continue
            seen = (id(gradient), gradient._version)
            if self._seen.get(name) == seen:
                yield name
            self._seen[name] = seen


_WARM = 10
"""Steps of training after which a freeze is taken for the end of a warm-up."""


class FrozenDuringTraining(EventCheck):
    """Parameters that were trained are frozen in the middle, and stay frozen.

    ## What it does
    Notes which parameters had gradients in some steps and do not require grad in later ones. Speaks when the watch ends
    with parameters that were frozen for the last 3 steps or more, and never restored before: an alternation is well.
    Who sets the gradients of just these to None has frozen them on purpose, and is left alone.
    Parameters that had trained for 10 steps or more were frozen for good by plan, a warm-up that is over: no fault.

    ## Why it is bad
    Something set `requires_grad` to False during training, a probe or a phase of alternating training, and did not
    restore it: that part of the model has stopped learning, while the loss still falls.

    ## Bad
    ```python
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for i in range(8):
            if i == 3:
                model[0].requires_grad_(False)  # for a probe of the head
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
            optimizer.step()
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for i in range(8):
            model[0].requires_grad_(i not in (3, 4))
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
            optimizer.step()
            audit.step()
    ```
    ## Fix
    Restore `requires_grad_(True)` after the phase, in `finally`. Where they are frozen on purpose, accept this warning:
    `sl.audit(..., accept={"SL650": ["backbone.*"]})`.

    ## Source
    https://github.com/Lightning-AI/pytorch-lightning/pull/5574.
    """

    code = "SL650"
    title = "frozen during training"
    severity = "warning"

    def __init__(self) -> None:
        self._since: Counter[str] = Counter()
        self._first: dict[str, int] = {}
        self._trained: Counter[str] = Counter()
        self._warm: set[str] = set()
        self._alternates: set[str] = set()
        self._were_frozen: set[str] = set()
        self._meant: set[str] = set()

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """Only notes."""
        if isinstance(event, Update):
            self._trained.update(state.owners[event.owner] - event.absent - event.frozen - self._warm)
            if len(self._warm) < len(self._trained):
                self._warm = {name for name, times in self._trained.items() if times >= _WARM}
            for name in event.frozen & self._trained.keys():
                self._since[name] += 1
                self._first.setdefault(name, event.iteration)
            thawed = (state.owners[event.owner] - event.frozen) & self._were_frozen
            self._alternates |= thawed
            for name in thawed & self._since.keys():
                del self._since[name]
            self._were_frozen |= event.frozen
        elif isinstance(event, Backward):
            self._alternates |= event.reached & self._since.keys()  # frozen for the step alone
        elif isinstance(event, Zero) and event.parameters <= set(self._trained):
            # who clears the gradients of what is frozen knows that it stays so
            self._meant |= event.parameters if not _trainable(event.parameters, state) else set()
        return iter(())

    def close(self, state: LoopState) -> Iterator[Fault]:
        """Where the watch ends with parameters that were frozen for at least 3 steps."""
        well = self._alternates | self._meant | self._warm
        names = sorted(name for name, times in self._since.items() if times >= 3 and name not in well)
        if not names:
            return
        yield self.fault(
            f"{listed(names)} {agree(len(names), 'was', 'were')} trained until iteration {self._first[names[0]]}, then "
            "frozen, and never trained again",
            where=f"iteration {self._first[names[0]]}",
            why="something set `requires_grad` to False during training (a probe, an alternating phase) and did not "
            "restore it",
            fix="restore `requires_grad_(True)` after the phase, in `finally`; accept this warning where they are "
            "frozen on purpose",
            names=names,
        )


def _trainable(names: frozenset[str], state: LoopState) -> bool:
    groups = (group for optimizer in state.optimizers.values() for group in optimizer.param_groups)
    return any(p.requires_grad for group in groups for p in group["params"] if state.name_of.get(id(p)) in names)
