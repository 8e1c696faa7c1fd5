"""The schedule operation: moves one learning-rate schedule, after each step or after each epoch."""

from __future__ import annotations

from collections.abc import Callable

from torch.optim.lr_scheduler import LRScheduler

from safeloop.step.report import Frame


class StepSchedule:
    """Moves a schedule after each step that updated its owner."""

    def __init__(self, owner: str, scheduler: LRScheduler) -> None:
        self._owner = owner
        self._scheduler = scheduler

    def __call__(self, frame: Frame) -> None:
        """Move it, at the end of a step."""
        if self._owner in frame.report.updated:
            self._scheduler.step()


class EpochSchedule:
    """Moves a schedule after each epoch in which its owner was updated, at the end of the epoch's last step.

    Args:
        owner: the optimizer's name.
        scheduler: its schedule.
        epochs_over: how many epochs are over, now.
    """

    def __init__(self, owner: str, scheduler: LRScheduler, epochs_over: Callable[[], int]) -> None:
        self.num_seen = 0
        """epochs that it has taken notice of"""
        self.was_updated = False
        """whether the owner was updated in the present epoch"""
        self._owner = owner
        self._scheduler = scheduler
        self._epochs_over = epochs_over

    def __call__(self, frame: Frame) -> None:
        """Move it, if this step ended an epoch; a step that ended several moves it several times."""
        self.was_updated = self.was_updated or self._owner in frame.report.updated
        over = self._epochs_over()
        if over > self.num_seen:
            for _ in range(over - self.num_seen if self.was_updated else 0):
                self._scheduler.step()
            self.num_seen, self.was_updated = over, False
