"""Random numbers: seeds derived from names, and regions that leave the global random state as they found it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def derive(seed: int, *keys: int | str) -> int:
    """The seed of one purpose, a 63-bit integer: `derive(seed, "order", epoch)`.

    The same in every process and on every machine. Different keys give unrelated seeds; `1` and `"1"` differ.
    """
    digest = hashlib.blake2b(repr((seed, *keys)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True, slots=True)
class RngState:
    """The states of the global generators of torch (CPU, and CUDA once initialised), numpy and Python."""

    torch: Tensor
    cuda: tuple[Tensor, ...]
    numpy: Any
    python: Any


def rng_state() -> RngState:
    """A copy of the global random state. About 30 us on CPU."""
    cuda = tuple(torch.cuda.get_rng_state_all()) if _has_cuda() else ()
    return RngState(torch.get_rng_state(), cuda, np.random.get_state(), random.getstate())


def restore_rng(state: RngState) -> None:
    """Put a copy of the global random state back, bit for bit."""
    torch.set_rng_state(state.torch)
    if state.cuda:
        torch.cuda.set_rng_state_all(state.cuda)
    np.random.set_state(state.numpy)
    random.setstate(state.python)


def seed_everything(seed: int) -> None:
    """Seed the global generators of torch, numpy and Python; on the CPU as `torch.manual_seed(seed)` does.

    CUDA's are seeded once initialised: `torch.manual_seed` would leave a seed behind that strikes when they come to
    life.
    """
    torch.default_generator.manual_seed(seed % 2**63)
    if _has_cuda():
        torch.cuda.manual_seed_all(seed % 2**63)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def isolated_rng(seed: int | None = None) -> Iterator[None]:
    """A region whose random draws the code after it never sees, also when it raises.

    With `seed` its draws are a function of the seed alone; without, they go on from the present state. A CUDA generator
    that comes to life inside is not put back: it had no state before.
    """
    state = rng_state()
    try:
        if seed is not None:
            seed_everything(seed)
        yield
    finally:
        restore_rng(state)


def _has_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
