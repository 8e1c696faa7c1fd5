"""Micro-batches one after the other, over epochs, on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from math import ceil
from typing import Any

from safeloop.data.source import Source
from safeloop.step.ended import DataEnded

__all__ = ["DataEnded", "Stream"]


class Stream:
    """Draws micro-batches: call it for the next one, `DataEnded` after the last of the last epoch.

    A step of several turns is not begun where the data is known to be too short for it: what is left of the last epoch
    is then not used. Data without a length can end inside a step: SL857.

    Args:
        source: the data.
        move: puts a batch on the device.
        count: how many samples a batch holds.
        max_epochs: None for no limit.
    """

    def __init__(
        self, source: Source, move: Callable[[Any], Any], count: Callable[[Any], int], max_epochs: int | None = None
    ) -> None:
        self.epoch = 0
        """epochs that are over"""
        self.num_samples = 0
        """samples drawn so far"""
        self._source = source
        self._move = move
        self._count = count
        self._max_epochs = max_epochs
        self._batches = self._all()
        self._peeked: list[Any] = []
        self._num_drawn = 0

    def num_windows(self, size: int) -> int | None:
        """How many windows of at most `size` micro-batches are still to come; None: no end, or nobody can know."""
        per_epoch = self._source.num_batches
        epochs = 1 if self._source.is_one_shot else self._max_epochs
        if per_epoch is None or epochs is None:
            return None
        here = per_epoch - self._num_drawn + len(self._peeked)
        if here < 0:  # the length was wrong
            return None
        return ceil(here / size) + max(0, epochs - self.epoch - 1) * ceil(per_epoch / size)

    def expect(self, windows: int, size: int) -> None:
        """Raise `DataEnded` where so many windows of at most `size` are known not to come."""
        left = self.num_windows(size)
        if left is not None and left < windows:
            raise DataEnded

    def __call__(self) -> Any:
        """The next micro-batch; `DataEnded` after the last."""
        if self._peeked:
            batch = self._peeked.pop(0)
        else:
            batch = next(self._batches, self)
            if batch is self:
                raise DataEnded
        self.num_samples += self._count(batch)
        return batch

    def window(self, size: int) -> list[Any]:
        """The next `size` micro-batches, fewer where an epoch ends: no window crosses its end."""
        first = self()
        batches, epoch = [first], self.epoch
        while len(batches) < size:
            try:
                self.peek()
            except DataEnded:
                break
            if self.epoch != epoch:
                break
            batches.append(self())
        return batches

    def count_epochs(self) -> int:
        """How many epochs are over, the present one included if its last micro-batch is drawn.

        Where the number of micro-batches is not known, the next one is drawn ahead: only it can tell.
        """
        if self._source.num_batches is None:
            with suppress(DataEnded):
                self.peek()
        is_last = not self._peeked and self._num_drawn == self._source.num_batches
        return self.epoch + is_last

    def peek(self) -> Any:
        """The micro-batch that the next call will give."""
        if not self._peeked:
            batch = self()
            self.num_samples -= self._count(batch)
            self._peeked.append(batch)
        return self._peeked[0]

    def put_back(self, batches: list[Any]) -> None:
        """Let micro-batches that were just drawn come again, in their order."""
        self._peeked[:0] = batches
        self.num_samples -= sum(self._count(batch) for batch in batches)

    def _all(self) -> Iterator[Any]:
        while self._max_epochs is None or self.epoch < self._max_epochs:
            for batch in self._source.epoch(self.epoch):
                self._num_drawn += 1
                yield self._move(batch)
            self.epoch += 1
            self._num_drawn = 0
            if self._source.is_one_shot:
                return


class EpochsSince:
    """How many epochs ended since a moment: call it for the number.

    Args:
        stream: whose epochs.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._before = 0

    def begin(self) -> None:
        """Count from now."""
        self._before = self._stream.count_epochs()

    def __call__(self) -> int:
        """Epochs that are over, the present one included if its last micro-batch is drawn."""
        return self._stream.count_epochs() - self._before
