"""Watches learning-rate schedules by their counters: whoever moves one, the next look sees it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from safeloop.audit.journal import Journal
from safeloop.audit.shims import find_schedulers, position
from safeloop.audit.updates import REPEATS
from safeloop.checks.events import Schedule


class ScheduleWatch:
    """Tells the journal of each move of a schedule.

    Args:
        journal: is told.
        optimizers: those of the loop, by name.
        given: the schedules; None: those of the process that move one of the optimizers, or another over the same
            parameters.
    """

    def __init__(
        self, journal: Journal, optimizers: Mapping[str, Optimizer], given: Iterable[LRScheduler] | None
    ) -> None:
        self._journal = journal
        self._optimizers = optimizers
        self._finds = given is None
        self._known: dict[int, tuple[LRScheduler, Any]] = {}
        self._moves: Counter[int] = Counter()
        self._add(given or ())
        self.find()

    def find(self) -> None:
        """Look for schedules that were built since, where none were given."""
        if self._finds:
            self._add(find_schedulers(self._optimizers.values()))

    def poll(self, *, is_deep: bool) -> None:
        """Tell what has moved since the last look; on plain iterations the first moves, and every tenth."""
        for key, (scheduler, before) in self._known.items():
            now = position(scheduler)
            if now == before:
                continue
            self._known[key] = (scheduler, now)
            self._moves[key] += 1
            if is_deep or self._moves[key] <= REPEATS or not self._moves[key] % REPEATS:
                self._tell(scheduler)

    def _tell(self, scheduler: LRScheduler) -> None:
        optimizer = scheduler.optimizer
        owner = self._journal.owner_of(optimizer) or ""
        called = bool(getattr(optimizer, "_opt_called", False))
        self._journal.record(Schedule(None, self._journal.iteration, owner, scheduler, called))

    def _add(self, schedulers: Iterable[LRScheduler]) -> None:
        for scheduler in schedulers:
            self._known.setdefault(id(scheduler), (scheduler, position(scheduler)))
