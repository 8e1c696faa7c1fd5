"""A schedule that is moved before the optimizer has made its first step."""

from __future__ import annotations

from collections.abc import Iterator

from safeloop.checks.check import EventCheck
from safeloop.checks.events import Event, LoopState, Schedule, Update
from safeloop.faults import Fault


class ScheduleMovedFirst(EventCheck):
    """A schedule is moved at the beginning of each epoch, the first time before any step.

    ## What it does
    Looks for a schedule that was moved exactly once before the first update of the loop, and is moved again after
    updates of its optimizer. A schedule that is moved many times before (a resumed run, steps without training), whose
    first update a gradient scaler has skipped, or that belongs to one of several optimizers which begins later, is
    left alone.

    ## Why it is bad
    A scheduler has set its first learning rate when it was built. Moved before the first epoch, that rate is never
    used, and each later one comes an epoch too early: a warm-up begins with its second rate, a milestone is missed by
    one. Until PyTorch 1.1 this was the order to use.

    ## Bad
    ```python
    import warnings

    warnings.simplefilter("ignore")  # PyTorch's own, which asks for another order
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[1], gamma=0.1)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for epoch in range(2):
            scheduler.step()
            for _ in range(3):
                optimizer.zero_grad()
                F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
                optimizer.step()
                audit.step()
    ```
    ## Good
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[1], gamma=0.1)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for epoch in range(2):
            for _ in range(3):
                optimizer.zero_grad()
                F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
                optimizer.step()
                audit.step()
            scheduler.step()
    ```
    ## Fix
    Call `scheduler.step()` at the end of an epoch, after the optimizer's steps.

    ## Source
    https://docs.pytorch.org/docs/stable/optim.html, "How to adjust learning rate".
    """

    code = "SL680"
    title = "scheduler moved before the first step"
    severity = "warning"

    def __init__(self) -> None:
        self._first: dict[int, Schedule] = {}
        self._has_updated = False

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the second move of a schedule whose first came before any update."""
        self._has_updated |= isinstance(event, Update)
        if not isinstance(event, Schedule) or not event.owner:
            return
        key = id(event.scheduler)
        if not self._has_updated:
            if key not in self._first and getattr(event.scheduler, "last_epoch", None) == 1 and not event.was_updated:
                self._first[key] = event
            else:
                self._first.pop(key, None)
            return
        first = self._first.pop(key, None)
        if first is None or not state.updates[event.owner]:
            return
        kind = type(event.scheduler).__name__
        yield self.fault(
            f"lr_scheduler.step() of {kind} ran before the first step of `{event.owner}`",
            where=f"scheduler {kind} of `{event.owner}`, iteration {first.iteration}",
            why="a scheduler sets its first learning rate when it is built: that one was never used, and every later "
            "one comes too early",
            fix="call the scheduler's step() at the end of an epoch, after the steps of its optimizer",
            names=(event.owner,),
        )
