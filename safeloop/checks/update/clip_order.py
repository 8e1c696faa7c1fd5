"""Clipping that has no effect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from safeloop.autograd.sites import Site
from safeloop.checks.check import EventCheck
from safeloop.checks.events import Backward, Clip, Event, LoopState, Update
from safeloop.checks.source import at
from safeloop.checks.wording import listed
from safeloop.faults import Fault

MEASURES = 1000.0
"""A limit above it is no limit: the call is there for the norm that it returns."""


class ClipWithoutEffect(EventCheck):
    """Gradients are clipped after the step that used them, before there are any, or those of another network.

    ## What it does
    Looks, at each `clip_grad_norm_` and `clip_grad_value_`, for gradients that it can still act on. Speaks at the
    second clip that finds only gradients which a step has used, or only zeros; and at the third on one line that is
    only ever given parameters of no optimizer, without a gradient, such as those of a target network, where the step
    after it uses gradients that nothing clips. A limit of infinity, or above 1000, is a way to measure the norm and is
    left out.

    ## Why it is bad
    Nothing uses what it clips: the step before it took the gradients as they were, and the run is as unprotected as
    without the clip.

    ## Bad
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(6):
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
            optimizer.step()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(6):
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            audit.step()
    ```
    ## Fix
    Clip between backward() and step(): backward, clip, step.

    ## Source
    https://github.com/VGraphRNN/VGRNN/issues/4.
    """

    code = "SL640"
    title = "clip without effect"

    def __init__(self) -> None:
        self._times = 0
        self._given_none = 0
        self._early: Clip | None = None
        self._is_early = False
        self._acting: set[Site | None] = set()
        """lines that have clipped gradients"""
        self._clipped_once: set[str] = set()
        self._beside: Clip | None = None
        """a clip of parameters that nobody trains, since which nothing was stepped"""
        self._waiting: frozenset[str] = frozenset()
        """parameters whose gradients a step could use at that clip"""
        self._beside_times: Counter[Site | None] = Counter()

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the second clip that finds only gradients which a step has used already, or none."""
        if isinstance(event, Clip) and event.limit <= MEASURES and state.is_known:
            self._note_beside(event, state)
            yield from self._clipped(event, state)
        elif isinstance(event, Update) and self._beside is not None and self._waiting & state.owners[event.owner]:
            yield from self._stepped_beside(event.owner, state)
        elif isinstance(event, Backward) and self._early is not None:
            self._is_early = not event.reached.isdisjoint(self._early.parameters)
        elif isinstance(event, Update) and self._early is not None and self._is_early:
            early = sorted(self._early.parameters & state.owners[event.owner])
            if early:
                yield from self._count(self._early, early, is_late=False)
                self._early, self._is_early = None, False

    def _clipped(self, event: Clip, state: LoopState) -> Iterator[Fault]:
        self._early, self._is_early = (event if event.is_empty and event.parameters else None), False
        if event.is_empty and not event.parameters and not event.unknown:
            yield from self._nothing(event)
        held = {name: state.held[name] for name in event.parameters & state.held.keys()}
        if event.is_empty or not held or any(h.is_manual or len(h.passes) > h.used for h in held.values()):
            return
        is_late = any(h.used for h in held.values())
        if is_late or event.are_zero:
            yield from self._count(event, sorted(held), is_late=is_late)

    def _count(self, event: Clip, names: list[str], *, is_late: bool) -> Iterator[Fault]:
        self._times += 1
        if self._times != 2:
            return
        yield self.fault(
            f"`{event.function}` ran "
            + ("after the step had used the gradients" if is_late else "before a backward pass had made gradients")
            + f" of {listed(names)}",
            where=at(event.site, "the clip"),
            why="nothing uses what it clips: the step before it took the gradients as they were"
            if is_late
            else "there is nothing to clip yet; the backward pass after it adds unclipped gradients",
            fix="clip between backward() and step(), and the parameters that are stepped: backward, clip, step",
            names=names,
        )

    def _note_beside(self, event: Clip, state: LoopState) -> None:
        if not event.is_empty:
            self._acting.add(event.site)
            self._clipped_once |= event.parameters
            return
        is_beside = bool(event.parameters or event.unknown) and event.parameters.isdisjoint(state.owner_of)
        fresh = (name for name, h in state.held.items() if len(h.passes) > h.used)
        self._beside = event if is_beside else None
        self._waiting = frozenset(fresh) & state.owner_of.keys()

    def _stepped_beside(self, owner: str, state: LoopState) -> Iterator[Fault]:
        """A step uses gradients that were there when others were clipped."""
        clip, self._beside = self._beside, None
        stepped = sorted(self._waiting & state.owners[owner])
        is_manual = any(name in state.held and state.held[name].is_manual for name in stepped)
        if clip is None or is_manual or clip.site in self._acting or not self._clipped_once.isdisjoint(stepped):
            return
        self._beside_times[clip.site] += 1
        if self._beside_times[clip.site] == 3:
            given = listed(sorted(clip.parameters)) if clip.parameters else f"{clip.unknown} parameters of no optimizer"
            yield self.fault(
                f"`{clip.function}` is given {given}, which have no gradient; those that `{owner}` steps on are "
                f"not clipped: {listed(stepped)}",
                where=at(clip.site, "the clip"),
                why="no optimizer holds what it was given, as the parameters of a target network or a copy: the norm "
                "is 0, and the step takes its gradients as they are",
                fix=f"clip the parameters that `{owner}` steps",
                names=stepped,
            )

    def _nothing(self, event: Clip) -> Iterator[Fault]:
        self._given_none += 1
        if self._given_none == 2:
            yield self.fault(
                f"`{event.function}` was given no parameter at all, so that nothing is clipped",
                where=at(event.site, "the clip"),
                why="`model.parameters()` is a generator: once an optimizer or a loop has gone through it, it is empty",
                fix="call `model.parameters()` again where you clip, or keep a list: `list(model.parameters())`",
            )
