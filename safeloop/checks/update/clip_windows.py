"""Clipping inside of an accumulation window, on sums that are not complete."""

from __future__ import annotations

from collections.abc import Iterator

from safeloop.checks.check import EventCheck
from safeloop.checks.events import Backward, Clip, Event, LoopState, Update
from safeloop.checks.source import at
from safeloop.checks.update.clip_order import MEASURES
from safeloop.checks.wording import listed
from safeloop.faults import Fault

_ENOUGH = 2


class ClippedInsideWindow(EventCheck):
    """Gradients are clipped after each micro-batch, not once before the step.

    ## What it does
    Looks, where several backward passes of one line add up to a step, for calls of `clip_grad_norm_` between them that
    scale the sum down. Speaks at the second one, when the step has come. Clips that do nothing, as below their limit or
    with one above 1000, gradients that the loop writes or moves elsewhere between two passes, and parameters whose
    optimizer steps more rarely than another one, are left alone.

    ## Why it is bad
    The limit is applied to a part of the sum. What the first micro-batches have added is shrunk again with each of the
    following ones, so that the last ones count most, and the gradient is not that of the whole batch.

    ## Bad
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for i in range(8):
            (F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)) / 4).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            if i % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for i in range(8):
            (F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)) / 4).backward()
            if i % 4 == 3:
                nn.utils.clip_grad_norm_(model.parameters(), 0.01)
                optimizer.step()
                optimizer.zero_grad()
            audit.step()
    ```
    ## Fix
    Clip once, after the last micro-batch, right before step().

    ## Source
    https://github.com/huggingface/transformers/issues/1563.
    """

    code = "SL676"
    title = "clipped after each micro-batch"
    severity = "warning"

    def __init__(self) -> None:
        self._last: Clip | None = None
        self._early: list[tuple[Clip, frozenset[str]]] = []
        """clips of this window that a further backward pass has added to, and the parameters concerned"""
        self._times = 0
        self._was_told = False

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the step for which sums were scaled down before they were complete, the second time."""
        if self._was_told or not isinstance(event, (Clip, Backward, Update)):
            return
        if isinstance(event, Clip):
            acts = event.coefficient is not None and event.limit <= MEASURES
            self._last = event if acts and state.is_known else None
        elif isinstance(event, Backward):
            self._add(event, state)
        else:
            early, self._early, self._last = self._early, [], None
            if early and not event.was_skipped and state.is_known:
                yield from self._stepped(event, early, state)

    def _add(self, event: Backward, state: LoopState) -> None:
        clip, self._last = self._last, None
        if clip is None or event.iteration - clip.iteration > 1:
            return
        held = {name: state.held[name] for name in clip.parameters & event.reached & state.held.keys()}
        kept = frozenset(
            name
            for name, h in held.items()
            if not h.is_manual and (left := h.passes[h.used :]) and all(b.site == event.site for b in left)
        )
        if kept:
            self._early.append((clip, kept))

    def _stepped(self, event: Update, early: list[tuple[Clip, frozenset[str]]], state: LoopState) -> Iterator[Fault]:
        owned = state.owners[event.owner]
        acting = [(clip, names & owned) for clip, names in early if names & owned and _has_shrunk(clip)]
        self._times += len(acting)
        if self._times < _ENOUGH or not acting:
            return
        self._was_told = True
        clip, some = acting[-1]
        names = sorted(some)
        yield self.fault(
            f"`{clip.function}` ran between the micro-batches of one step of `{event.owner}` and scaled down the "
            f"gradients so far of {listed(names)}",
            where=at(clip.site, "the clip"),
            why="the limit is applied to a part of the sum: what the first micro-batches have added is shrunk again "
            "with each further one, and the last ones count most",
            fix=f"clip once, after the last micro-batch, right before `{event.owner}.step()`",
            names=names,
        )


def _has_shrunk(clip: Clip) -> bool:
    """Whether a clip has changed anything; reads the device."""
    return clip.coefficient is not None and bool(clip.coefficient < 1)
