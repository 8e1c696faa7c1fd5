"""The random state at the start of each turn, for a replay: kept as cheaply as it stays exact."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_cpu_state = torch.default_generator.get_state
FIRST_TURNS = 20
EVERY = 256


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
    host: HostState | None
    """None where turns are not known to draw from Python's and numpy's generators"""

    def restore(self) -> None:
        """Put all of it back, bit for bit."""
        torch.set_rng_state(self.cpu)
        for index, state in self.cuda:
            torch.cuda.set_rng_state(state, index)
        if self.host is not None:
            self.host.restore()


class RandomKeeper:
    """`keep()`: the random state now, at the start of a turn; `ran(state)`: forward and backward are over.

    torch's generators are copied at every turn, about 2 us. Python's and numpy's take 60 us, and most turns never draw
    from them, though the data between two turns may: they are copied on the first 20 turns and every 256th, and on
    every turn once one has been seen to draw. Only a run whose loss function draws from them for the first time within
    the last 256 turns is not replayed exactly.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._cuda = sorted({device.index or 0 for device in devices if device.type == "cuda"})
        self._turns = 0
        self._is_drawn_from = False

    def keep(self) -> RandomState:
        """A copy of the state; no sync."""
        turn = self._turns
        self._turns = turn + 1
        is_due = turn < FIRST_TURNS or self._is_drawn_from or not turn % EVERY
        if not is_due and not self._cuda:
            return tuple.__new__(RandomState, (_cpu_state(), (), None))  # its own __new__ is a function of Python's
        cuda = tuple((index, torch.cuda.get_rng_state(index)) for index in self._cuda)
        return RandomState(_cpu_state(), cuda, HostState.now() if is_due else None)

    def ran(self, state: RandomState) -> None:
        """Find out whether the turn that began with this state has drawn from Python's or numpy's generator."""
        if state.host is not None and not self._is_drawn_from:
            self._is_drawn_from = not HostState.now().is_same(state.host)
