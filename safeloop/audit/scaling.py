"""Watches gradient scalers: what they unscale, step and skip, as events."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch.amp import GradScaler
from torch.optim import Optimizer

from safeloop.audit.journal import Journal
from safeloop.audit.shims import ScalerShim, find_scalers
from safeloop.audit.updates import Updates
from safeloop.autograd.sites import user_site
from safeloop.checks.events import ScaleUpdate, Unscale


class ScalerWatch:
    """Tells the journal of each call of a scaler, and of the updates that it left out.

    Args:
        journal: is told.
        updates: makes the event of an update that was left out.
        given: the scalers; None: those of the process, and others as they are met.
        broken: takes errors of our own.
    """

    def __init__(
        self, journal: Journal, updates: Updates, given: Iterable[GradScaler] | None, broken: list[Exception]
    ) -> None:
        self._journal = journal
        self._updates = updates
        self._broken = broken
        self._shims: dict[int, ScalerShim] = {}
        self.did_step = False
        """whether an optimizer was stepped since the scaler last began to step one"""
        for scaler in find_scalers() if given is None else given:
            self.found(scaler)

    def found(self, scaler: GradScaler) -> None:
        """Watch one more."""
        if id(scaler) not in self._shims:
            self._shims[id(scaler)] = ScalerShim(scaler, self._told, self._broken)

    def remove(self) -> None:
        """Leave the scalers as they were."""
        for shim in self._shims.values():
            shim.remove()
        self._shims.clear()

    def _told(self, what: str, optimizer: Optimizer | None, scaler: GradScaler) -> None:
        journal = self._journal
        owner = journal.owner_of(optimizer)
        if what == "update":
            journal.record(ScaleUpdate(user_site(), journal.iteration))
        elif owner is None or optimizer is None:
            return
        elif what == "unscale":
            journal.record(Unscale(user_site(), journal.iteration, owner))
        elif what == "before step":
            self.did_step = False
        elif not self.did_step:
            event = self._updates.event(owner, optimizer, is_deep=journal.state.is_known, skipped=True)
            journal.record(replace(event, scale=float(scaler.get_scale())))
