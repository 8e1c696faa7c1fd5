"""Micro-batches that an epoch has left, and that never count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from safeloop.autograd.sites import Site
from safeloop.checks.check import EventCheck
from safeloop.checks.events import Backward, Event, LoopState, Update, Zero
from safeloop.checks.source import at
from safeloop.checks.update.windows import is_tail, window_of
from safeloop.faults import Fault


class TailDiscarded(EventCheck):
    """The micro-batches that are left at the end of an epoch are zeroed before the next one.

    ## What it does
    Compares the windows of micro-batches that steps use with those that zero_grad throws away. Speaks at the second
    time that a shorter window, of backward passes on the same line, was zeroed without a step. Once is enough where
    each loss is divided by the length of a window, and the line that zeroed had run before the first backward pass, as
    the one at the head of an epoch has: a batch that is dropped for a NaN is zeroed by another.

    ## Why it is bad
    With 10 micro-batches and a step after every fourth, the last two of each epoch never count. Where the order of the
    data is fixed, the same samples are never trained on.

    ## Bad
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for epoch in range(3):
            optimizer.zero_grad()
            for i in range(10):
                (F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)) / 4).backward()
                if (i + 1) % 4 == 0:
                    optimizer.step()
                    optimizer.zero_grad()
                    audit.step()
    ```
    ## Good
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for epoch in range(3):
            optimizer.zero_grad()
            for i in range(10):
                length = 4 if i < 8 else 2
                (F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)) / length).backward()
                if (i + 1) % 4 == 0 or i == 9:
                    optimizer.step()
                    optimizer.zero_grad()
                    audit.step()
    ```
    ## Fix
    Step on the last window of an epoch too, and divide its losses by the number of micro-batches that it has.

    ## Source
    https://github.com/jingyaogong/minimind/issues/749.
    """

    code = "SL655"
    title = "last micro-batches discarded"
    severity = "warning"

    def __init__(self) -> None:
        self._window: dict[str, list[Backward]] = {}
        self._even: Counter[str] = Counter()
        """owner -> steps so far on windows that are all of one length, by which each loss is divided"""
        self._is_begun = False
        """whether a backward pass has run"""
        self._early: set[Site | None] = set()
        self._usual: set[Site | None] = set()
        """lines that zero what a step has used"""
        self._times: Counter[str] = Counter()
        self._pending: dict[str, Fault] = {}
        self._told: set[str] = set()

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the second shorter window that is zeroed, or at the step after the first one."""
        if not state.is_known or state.inside:
            return
        if isinstance(event, Update) and not event.has_closure:
            yield from self._stepped(event.owner, window_of(event.owner, state))
        self._is_begun |= isinstance(event, Backward)
        if not isinstance(event, Zero):
            return
        if not self._is_begun:
            self._early.add(event.site)
        for owner in dict.fromkeys(state.owner_of[name] for name in event.parameters & state.owner_of.keys()):
            full, left = self._window.get(owner, []), window_of(owner, state)
            if any(state.held[name].used for name in event.parameters & state.held.keys()):
                self._usual.add(event.site)
            if owner in self._told or not is_tail(left, full):
                continue
            self._times[owner] += 1
            fault = self._fault(event, owner, left, full)
            if self._times[owner] == 2:
                self._told.add(owner)
                yield fault
            elif self._even[owner] > 1 and event.site in (self._early | state.early_zeroing) - self._usual:
                self._pending[owner] = fault

    def _stepped(self, owner: str, window: list[Backward]) -> Iterator[Fault]:
        before = self._window.get(owner, window)
        self._window[owner] = window
        is_even = len(window) == len(before) and _is_divided(window)
        self._even[owner] = self._even[owner] + 1 if is_even else 0
        fault = self._pending.pop(owner, None)
        if fault is not None and is_even and owner not in self._told:
            self._told.add(owner)
            yield fault

    def _fault(self, event: Zero, owner: str, left: Sequence[Backward], full: Sequence[Backward]) -> Fault:
        return self.fault(
            f"zero_grad threw away the last {len(left)} micro-batches before `{owner}` had stepped on them; "
            f"its other windows have {len(full)}",
            where=f"{at(event.site, 'zero_grad')}; the micro-batches: {at(left[-1].site, 'a backward pass')}",
            why="the number of batches of an epoch is no multiple of the window: what is left at its end never counts",
            fix="step on the last, shorter window of an epoch too, with its losses divided by its own length",
            names=(owner,),
        )


def _is_divided(window: Sequence[Backward]) -> bool:
    """Whether each loss of a window is divided by the window's length."""
    length = len(window)
    return length > 1 and all(p.factor is not None and abs(p.factor * length - 1) < 1e-9 for p in window)
