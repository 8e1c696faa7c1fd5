"""The random state at the start of a turn, for a replay: kept where turns draw from it."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from safeloop.seeds import RngState

_cpu_state = torch.default_generator.get_state
FIRST_TURNS = 20
EVERY = 16
"""Steps from one copy of torch's state to the next, where no turn is known to draw from it"""
EVERY_OF_HOST = 256
"""The same of Python's and numpy's"""


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
    """What a turn can draw from, as far as it was kept. A tuple: a frozen dataclass takes twice as long to make."""

    cpu: Tensor | None
    """None where turns are not known to draw from torch's generators"""
    cuda: tuple[tuple[int, Tensor], ...]
    """device index -> state, of the devices that the run trains on; kept where `cpu` is"""
    host: HostState | None
    """None where turns are not known to draw from Python's and numpy's generators"""

    def restore(self) -> None:
        """Put back what was kept, bit for bit."""
        if self.cpu is not None:
            torch.set_rng_state(self.cpu)
        for index, state in self.cuda:
            torch.cuda.set_rng_state(state, index)
        if self.host is not None:
            self.host.restore()

    def covers(self, before: RngState, after: RngState) -> bool:
        """Whether nothing was drawn between two states but from generators that were kept."""
        if self.cpu is None and not all(map(torch.equal, (before.torch, *before.cuda), (after.torch, *after.cuda))):
            return False
        start, end = HostState(before.python, before.numpy), HostState(after.python, after.numpy)
        return self.host is not None or start.is_same(end)


NOTHING_KEPT = RandomState(None, (), None)


class RandomKeeper:
    """`keep(step)`: the random state now, at the start of a turn; `ran(state)`: forward and backward are over.

    A copy of torch's state takes 5 us, of Python's and numpy's 60 us. The data between two turns draws from them, many
    turns never do: the states are copied on the first 20 turns, then torch's on every 16th step and the others' on
    every 256th, and on every turn once one has been seen to draw. Only a turn whose loss function has begun to draw
    since the last time that somebody looked is not replayed exactly; its replay says so.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self.is_idle = False
        """whether nothing is to be kept between two steps whose number is a multiple of `EVERY`"""
        self._cuda = sorted({device.index or 0 for device in devices if device.type == "cuda"})
        self._turns = 0
        self._draws_torch = False
        self._draws_host = False

    def keep(self, step: int) -> RandomState:
        """A copy of what a turn of this step may draw from; no sync."""
        self._turns += 1
        is_first = self._turns <= FIRST_TURNS
        wants_torch = is_first or self._draws_torch or not step % EVERY
        wants_host = is_first or self._draws_host or not step % EVERY_OF_HOST
        if not wants_torch and not wants_host:
            return NOTHING_KEPT
        cuda = tuple((index, torch.cuda.get_rng_state(index)) for index in self._cuda) if wants_torch else ()
        return RandomState(_cpu_state() if wants_torch else None, cuda, HostState.now() if wants_host else None)

    def ran(self, state: RandomState) -> None:
        """Find out what the turn that began with this state has drawn from."""
        if state.cpu is not None and not self._draws_torch:
            now = (_cpu_state(), *(torch.cuda.get_rng_state(index) for index in self._cuda))
            self._draws_torch = not all(map(torch.equal, (state.cpu, *(one for _, one in state.cuda)), now))
        if state.host is not None and not self._draws_host:
            self._draws_host = not HostState.now().is_same(state.host)
        self.is_idle = self._turns >= FIRST_TURNS and not self._draws_torch and not self._draws_host
