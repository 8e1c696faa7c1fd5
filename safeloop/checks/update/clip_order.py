"""Clipping that has no effect."""

from __future__ import annotations

from collections.abc import Iterator

from safeloop.checks.check import EventCheck
from safeloop.checks.events import Clip, Event, LoopState
from safeloop.checks.source import at
from safeloop.checks.wording import listed
from safeloop.faults import Fault


class ClipWithoutEffect(EventCheck):
    """Gradients are clipped after the step that used them, or before there are any.

    ## Source
    https://github.com/VGraphRNN/VGRNN/issues/4.
    """

    code = "SL640"
    title = "clip without effect"

    def __init__(self) -> None:
        self._times = 0

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the second clip that finds only gradients which a step has used already, or none."""
        if not isinstance(event, Clip) or event.limit == float("inf") or not state.is_known:
            return
        held = {name: state.held[name] for name in event.parameters & state.held.keys()}
        if not held or any(h.is_manual or len(h.passes) > h.used for h in held.values()):
            return
        self._times += 1
        if self._times != 2:
            return
        is_late = any(h.used for h in held.values())
        yield self.fault(
            f"`{event.function.strip('_')}` ran "
            + ("after the step had used the gradients" if is_late else "before a backward pass had made gradients")
            + f" of {listed(sorted(held))}",
            where=at(event.site, "the clip"),
            why="nothing uses what it clips: the step before it took the gradients as they were"
            if is_late
            else "there is nothing to clip yet; the backward pass after it adds unclipped gradients",
            fix="clip between backward() and step(): backward, clip, step",
            names=sorted(held),
        )
