"""Updates that a gradient scaler never lets through."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from safeloop.checks.check import EventCheck
from safeloop.checks.events import Event, LoopState, Update
from safeloop.checks.source import at
from safeloop.checks.wording import counted, listed
from safeloop.faults import Fault

_OVERFLOWS = 8
"""A scale of 65536 that is halved so often is at 256: more overflows in a row are no search for the right scale."""
_LARGE = 1024.0
"""Gradients that overflow at a scale below it would overflow without one soon."""


class EveryUpdateSkipped(EventCheck):
    """The gradient scaler skips every update, because a gradient is never finite.

    ## What it does
    Counts the steps in a row that the scaler skips for each optimizer. Speaks at the eighth, or after 5 where the watch
    ends, once the scale is no longer large; at the fortieth in any case. Names the parameters whose gradients are not
    finite.

    ## Why it is bad
    A skip is silent. Halving the scale cures an overflow; a gradient that stays NaN or infinite has another cause, and
    nothing is trained meanwhile.

    ## Bad
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(10):
            optimizer.zero_grad()
            out = model(torch.randn(8, 4))
            scaler.scale((out - out).square().sum().sqrt()).backward()  # the derivative of sqrt at 0 is infinite
            scaler.step(optimizer)
            scaler.update()
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(10):
            optimizer.zero_grad()
            out = model(torch.randn(8, 4))
            scaler.scale((out.square().sum() + 1e-8).sqrt()).backward()
            scaler.step(optimizer)
            scaler.update()
            audit.step()
    ```
    ## Fix
    Look for sqrt, log, division or a power at the edge of its domain, also behind `torch.where`, on the way to the
    parameters that the fault names.

    ## Source
    https://github.com/facebookresearch/habitat-lab/issues/2226; documentation of `torch.amp.GradScaler.step`.
    """

    code = "SL643"
    title = "every update skipped"

    def __init__(self) -> None:
        self._row: Counter[str] = Counter()
        self._last: dict[str, Update] = {}
        self._told: set[str] = set()

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the eighth skip in a row, the fortieth where the scale is still large."""
        if not isinstance(event, Update) or not event.is_scaled_step:
            return
        self._row[event.owner] = self._row[event.owner] + 1 if event.was_skipped else 0
        if event.was_skipped:
            self._last[event.owner] = event
            is_large = event.scale is not None and event.scale > _LARGE
            yield from self._skipped(event.owner, 5 * _OVERFLOWS if is_large else _OVERFLOWS)

    def close(self, state: LoopState) -> Iterator[Fault]:
        """Where the watch ends after at least 5 in a row."""
        for owner in list(self._row):
            scale = self._last[owner].scale if owner in self._last else None
            if scale is None or scale <= 8 * _LARGE:
                yield from self._skipped(owner, 5)

    def _skipped(self, owner: str, patience: int) -> Iterator[Fault]:
        count = self._row[owner]
        if count < patience or owner in self._told:
            return
        self._told.add(owner)
        event = self._last[owner]
        yield self.fault(
            f"the gradient scaler skipped {counted(count, 'update')} of `{owner}` in a row: the gradients of "
            f"{listed(event.bad) if event.bad else 'some parameters'} are not finite",
            where=at(event.site, f"scaler.step({owner})"),
            why="halving the scale cures an overflow; a gradient that stays NaN or infinite has another cause, and "
            "nothing is trained meanwhile",
            fix="look for sqrt, log, division or a power at the edge of its domain, also behind torch.where, on the "
            "way to these parameters",
            names=event.bad,
        )
