"""Micro-batches one after the other, over epochs, on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from safeloop.data.source import Source


class DataEnded(Exception):
    """There is no further micro-batch: the last epoch is over, or the data can be read only once."""


class Stream:
    """Draws micro-batches: call it for the next one.

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

    def num_steps(self, max_steps: int | None) -> int | None:
        """How many steps a run of at most `max_steps` takes; None where nobody can know."""
        per_epoch = self._source.num_batches
        known = [max_steps] if max_steps is not None else []
        if per_epoch is not None and self._max_epochs is not None:
            known.append(per_epoch * self._max_epochs)
        return min(known, default=None)

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
