"""Updates that a gradient scaler never lets through."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import Tensor

from safeloop.autograd.bad import BadTrace
from safeloop.autograd.tape import Call, Tape
from safeloop.checks.check import CallCheck, EventCheck
from safeloop.checks.events import Event, LoopState, Update
from safeloop.checks.source import at
from safeloop.checks.wording import counted, listed
from safeloop.faults import Fault

_OVERFLOWS = 8
"""A scale of 65536 that is halved so often is at 256: more overflows in a row are no search for the right scale."""
_SEARCHED = 3
"""After so many skips in a row, the operation is looked for in whose derivative the value is born."""
_LARGE = 1024.0
"""Gradients that overflow at a scale below it would overflow without one soon."""


class EveryUpdateSkipped(CallCheck, EventCheck):
    """The gradient scaler skips every update, because a gradient is never finite.

    ## What it does
    Counts the steps in a row that the scaler skips for each optimizer. Speaks at the eighth, or after 5 where the watch
    ends, once the scale is no longer large; at the fortieth in any case. Names the parameters whose gradients are not
    finite, and on steps that are looked at in depth the line in whose derivative they became so.

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
    hears = frozenset(("backward",))

    def __init__(self) -> None:
        self._trace: tuple[BadTrace, Tape] | None = None
        self._born = ""
        self._row: Counter[str] = Counter()
        self._last: dict[str, Update] = {}
        self._told: set[str] = set()

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the eighth skip in a row, the fortieth where the scale is still large."""
        if not isinstance(event, Update) or not event.is_scaled_step:
            return
        self._row[event.owner] = self._row[event.owner] + 1 if event.was_skipped else 0
        self._take_source(was_skipped=event.was_skipped)
        if event.was_skipped:
            self._last[event.owner] = event
            is_large = event.scale is not None and event.scale > _LARGE
            yield from self._skipped(event.owner, 5 * _OVERFLOWS if is_large else _OVERFLOWS)

    def hear(self, call: Call) -> Iterator[Fault]:
        """Before a backward pass, after several skips in a row: watch where its first bad gradient is made."""
        if self._trace is not None:
            self._trace[0].finish()
            self._trace = None
        if max(self._row.values(), default=0) >= _SEARCHED and not self._told:
            first = call.args[0] if call.args else call.kwargs.get("tensors")
            self._trace = BadTrace(_tensors(first)), call.tape
        return iter(())

    def _take_source(self, *, was_skipped: bool) -> None:
        """Where the gradient of the pass that is over became bad."""
        if self._trace is None:
            return
        trace, tape = self._trace
        self._trace = None
        source = trace.finish()
        origin = None if source is None else tape.origins.get(source.number)
        if was_skipped and source is not None and origin is not None:
            self._born = f"; born in `{source.name}`, {at(origin.site, origin.name)}"

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
            where=at(event.site, f"scaler.step({owner})") + self._born,
            why="halving the scale cures an overflow; a gradient that stays NaN or infinite has another cause, and "
            "nothing is trained meanwhile",
            fix="look for sqrt, log, division or a power at the edge of its domain, also behind torch.where, on the "
            "way to these parameters",
            names=event.bad,
        )


def _tensors(value: object) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for t in value or () if isinstance(t, Tensor)]  # type: ignore[attr-defined]
