"""Gradient scalers that are used in the wrong order, or not at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from safeloop.checks.check import EventCheck
from safeloop.checks.events import Clip, Event, LoopState, ScaleUpdate, Update
from safeloop.checks.source import at
from safeloop.checks.wording import counted, listed
from safeloop.faults import Fault

_OVERFLOWS = 8
"""A scale of 65536 that is halved so often is at 256: more overflows in a row are no search for the right scale."""


def _scaled(names: frozenset[str], state: LoopState) -> list[str]:
    """Parameters whose `.grad` holds scaled gradients that no step has used."""
    held = {name: state.held[name] for name in names & state.held.keys() if not state.held[name].is_manual}
    return sorted(n for n, h in held.items() if any(b.is_scaled for b in h.passes[h.used :]))


class ClippedWhileScaled(EventCheck):
    """Gradients are clipped while they are still multiplied by the scale of the gradient scaler.

    ## Source
    https://github.com/Lightning-AI/pytorch-lightning/issues/9599; documentation of `torch.amp`, "Gradient clipping".
    """

    code = "SL641"
    title = "clipped before unscale"

    def __init__(self) -> None:
        self._was_told = False

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the first clip of scaled gradients."""
        if self._was_told or not isinstance(event, Clip) or event.limit == float("inf"):
            return
        names = [n for n in _scaled(event.parameters, state) if state.owner_of.get(n) not in state.unscaled]
        if not names:
            return
        self._was_told = True
        owner = state.owner_of.get(names[0], "optimizer")
        yield self.fault(
            f"gradients were clipped to {event.limit:g} while the scaler's factor was still in them: {listed(names)}",
            where=at(event.site, "the clip"),
            why="the limit is compared with gradients that are thousands of times too large: nearly everything is "
            "clipped, the more the larger the scale",
            fix=f"call `scaler.unscale_({owner})` before the clip; scaler.step() then leaves them as they are",
            names=names,
        )


class ScaledUpdate(EventCheck):
    """An optimizer steps on gradients that are still multiplied by the scale of the gradient scaler.

    ## Source
    https://github.com/harubaru/waifu-diffusion/issues/64.
    """

    code = "SL642"
    title = "step on scaled gradients"

    def __init__(self) -> None:
        self._was_told = False

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the first such step."""
        if self._was_told or not isinstance(event, Update) or event.is_scaled_step or event.owner in state.unscaled:
            return
        names = _scaled(state.owners[event.owner], state)
        if not names:
            return
        self._was_told = True
        yield self.fault(
            f"`{event.owner}` stepped on gradients that are still multiplied by the scaler's factor: {listed(names)}",
            where=at(event.site, f"step of `{event.owner}`"),
            why="the loss was scaled, and the step does not go through the scaler: the learning rate, the weight decay "
            "and eps are off by the scale, and an overflow is not skipped",
            fix=f"replace `{event.owner}.step()` by `scaler.step({event.owner})` and `scaler.update()`",
            names=names,
        )


class EveryUpdateSkipped(EventCheck):
    """The gradient scaler skips every update, because a gradient is never finite.

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
        """At the eighth skip in a row."""
        if not isinstance(event, Update) or not event.is_scaled_step:
            return
        self._row[event.owner] = self._row[event.owner] + 1 if event.was_skipped else 0
        if event.was_skipped:
            self._last[event.owner] = event
        yield from self._skipped(event.owner, _OVERFLOWS)

    def close(self, state: LoopState) -> Iterator[Fault]:
        """Where the watch ends after at least 5 in a row."""
        for owner in list(self._row):
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
            fix="look for sqrt, log, division or a power at the edge of its domain, also behind torch.where, on the way "
            "to these parameters",
            names=event.bad,
        )


class ScaleUpdatedTooEarly(EventCheck):
    """The scale is adapted between a backward pass and the unscaling of its gradients.

    ## Source
    https://github.com/huggingface/accelerate/issues/439; documentation of `torch.amp`, "Working with multiple models,
    losses, and optimizers".
    """

    code = "SL644"
    title = "scale updated too early"

    def __init__(self) -> None:
        self._was_told = False

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the first step on gradients that were scaled before the last update of the scale."""
        if self._was_told or not isinstance(event, Update) or not event.is_scaled_step or event.owner in state.unscaled:
            return
        updates = [i for i, e in enumerate(state.recent) if isinstance(e, ScaleUpdate)]
        if not updates:
            return
        names = []
        for name in _scaled(state.owners[event.owner], state):
            held = state.held[name]
            fresh = [state.recent.index(b) for b in held.passes[held.used :] if b in state.recent]
            if fresh and min(fresh) < updates[-1]:
                names.append(name)
        if not names:
            return
        self._was_told = True
        site = state.recent[updates[-1]].site
        yield self.fault(
            f"scaler.update() ran between the backward pass of {listed(names)} and the step of `{event.owner}`",
            where=f"{at(event.site, 'the step')}; update: {at(site, 'scaler.update()')}",
            why="when that update changed the scale, these gradients are divided by another factor than they were "
            "multiplied by",
            fix="call scaler.update() once an iteration, after the last scaler.step()",
            names=names,
        )
