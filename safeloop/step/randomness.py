"""The random state at the start of each turn, for a replay: kept as cheaply as it stays exact."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

FIRST_TURNS = 20
EVERY = 64


@dataclass(frozen=True, slots=True)
class HostState:
    """The states of Python's and numpy's global generators."""

    python: Any
    numpy: Any

    @classmethod
    def now(cls) -> HostState:
        """A copy of both; about 60 us."""
        return cls(random.getstate(), np.random.get_state())

    def is_same(self, other: HostState) -> bool:
        """Whether nothing was drawn between the two."""
        return self.python == other.python and all(
            bool(np.array_equal(a, b)) for a, b in zip(self.numpy, other.numpy, strict=True)
        )

    def restore(self) -> None:
        """Put both back."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)


class RandomState(NamedTuple):
    """All that a turn can draw from. A tuple, as it is made at every turn: a frozen dataclass takes twice as long."""

    cpu: Tensor
    cuda: tuple[tuple[int, Tensor], ...]
    """device index -> state, of the devices that the run trains on"""
    host: HostState
    is_host_fresh: bool = True
    """whether `host` was copied at the start of this very turn"""

    def restore(self) -> None:
        """Put all of it back, bit for bit."""
        torch.set_rng_state(self.cpu)
        for index, state in self.cuda:
            torch.cuda.set_rng_state(state, index)
        self.host.restore()

    @property
    def is_known(self) -> bool:
        """Whether `host` is surely that of the turn's start, asked before anything else is drawn."""
        return self.is_host_fresh or self.host.is_same(HostState.now())


class RandomKeeper:
    """`keep()`: the random state now.

    torch's generators are copied at every turn, about 2 us. Python's and numpy's take 60 us, and most runs never draw
    from them: they are copied on the first 20 turns and every 64th, and on every turn once a copy has differed from
    the one before. A state that nobody has drawn from since it was copied is still the present one, which a replay
    checks; only a run that draws from them for the first time within the last 64 turns is not replayed exactly.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._cuda = sorted({device.index or 0 for device in devices if device.type == "cuda"})
        self._turns = 0
        self._is_drawn_from = False
        self._host: HostState | None = None

    def keep(self) -> RandomState:
        """A copy of the state; no sync."""
        turn = self._turns
        self._turns = turn + 1
        host = self._host
        is_due = host is None or self._is_drawn_from or turn < FIRST_TURNS or turn % EVERY == 0
        if is_due:
            host = self._look(host)
        assert host is not None
        cuda = tuple((index, torch.cuda.get_rng_state(index)) for index in self._cuda) if self._cuda else ()
        return RandomState(torch.default_generator.get_state(), cuda, host, is_due)

    def _look(self, before: HostState | None) -> HostState:
        now = HostState.now()
        if before is not None and not self._is_drawn_from:
            self._is_drawn_from = not now.is_same(before)
        self._host = now
        return now
