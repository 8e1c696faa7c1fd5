"""Whether a checkpointed region computes in the backward pass what it had computed in the forward."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint

from safeloop.autograd.fingerprints import is_plain
from safeloop.autograd.sites import Site, is_user_code, site_of, user_frame

_CHECKS: dict[str, Callable[[Tensor], Any]] = getattr(checkpoint, "_allowed_determinism_checks_to_fns", {})
_PLAIN = _CHECKS.get("default")
_CHECKPOINT = inspect.unwrap(checkpoint.checkpoint).__code__
_MOST = 1 << 20
"""So many entries of a saved tensor are read."""
_DIFFERENT = 1e-2
"""Readings further apart than this part of the norm are of different values, not of the same ones rounded otherwise."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The first tensor that a checkpointed region saved and that its recomputation gave otherwise."""

    shape: tuple[int, ...]
    made_at: Site | None
    """the user's line that ran when it was saved"""
    called_at: Site | None
    """the user's line that called the checkpoint"""
    keeps_random_state: bool
    """False with `preserve_rng_state=False`"""


class _Reading(dict[str, Any]):
    """What torch compares of a saved tensor and of its recomputation, and a reading of its values."""

    guard: RecomputationGuard | None = None
    projection: Tensor | None = None
    difference: Difference | None = None

    def __ne__(self, other: object) -> bool:
        if self.guard is not None and isinstance(other, _Reading):
            self.guard.compared(self, other)
        return bool(super().__ne__(other))


class RecomputationGuard:
    """Reads what non-reentrant checkpointing saves, and again what the backward pass recomputes.

    torch itself compares shape, dtype and device of the two: in its place, while the guard is on, a reading that
    compares in the same way and notes a projection of the values. Regions that were entered meanwhile stay guarded.
    Two projections differ by as much as the values do, so that rounding is none. Buffers are left out: batch
    normalisation saves its running statistics and does not use them. Cost: two reductions for each saved tensor of a
    checkpointed region, twice; one sync in `verify` on accelerators.
    """

    def __init__(self, buffers: Callable[[], Iterable[Tensor]] = tuple) -> None:
        self._buffers = buffers
        self._held: set[int] = set()
        self._pairs: list[tuple[_Reading, _Reading]] = []

    def start(self) -> None:
        """Guard the regions that are entered from now on."""
        if _PLAIN is not None and _CHECKS.get("default") is _PLAIN:
            self._held = {b.untyped_storage().data_ptr() for b in self._buffers() if is_plain(b)}
            _CHECKS["default"] = self._read

    def stop(self) -> None:
        """Guard no further regions."""
        if _PLAIN is not None and _CHECKS.get("default") == self._read:
            _CHECKS["default"] = _PLAIN

    def verify(self) -> list[Difference]:
        """The first difference of each checkpoint, of what was recomputed since the last call."""
        pairs, self._pairs = self._pairs, []
        found: dict[Site | None, Difference] = {}
        for before, after in pairs:
            if before.difference is not None and before.difference.called_at not in found and _differ(before, after):
                found[before.difference.called_at] = before.difference
        return list(found.values())

    def compared(self, before: _Reading, after: _Reading) -> None:
        """torch compares the two."""
        if before.projection is not None and after.projection is not None:
            self._pairs.append((before, after))

    def _read(self, tensor: Tensor) -> _Reading:
        assert _PLAIN is not None
        reading = _Reading(_PLAIN(tensor))
        try:
            with torch._C.DisableTorchFunction():  # no function mode is to hear what the guard does
                if is_plain(tensor) and tensor.untyped_storage().data_ptr() not in self._held:
                    reading.projection = _projection(tensor)
                    reading.difference = _place(tuple(tensor.shape))
                    reading.guard = self
        except Exception:  # a kind of tensor that cannot be read must not stop the program that is watched
            reading.guard = None
        return reading


def _projection(tensor: Tensor) -> Tensor:
    """A projection of the values on a fixed direction, and their norm."""
    values = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    flat = values.reshape(-1)
    flat = flat[:: max(1, flat.numel() // _MOST)].float()
    direction = torch.arange(flat.numel(), device=flat.device, dtype=torch.float32).mul_(1.618).cos_()
    return torch.stack([torch.dot(flat, direction), flat.norm()])


def _differ(before: _Reading, after: _Reading) -> bool:
    assert before.projection is not None
    assert after.projection is not None
    if before.projection.shape != after.projection.shape:
        return False
    (old, norm), (new, other) = before.projection.tolist(), after.projection.tolist()
    return bool(abs(old - new) > _DIFFERENT * max(norm, other))


def _place(shape: tuple[int, ...]) -> Difference:
    """The lines of the user's that run now, and the arguments of the checkpoint above them."""
    inner = user_frame(3)
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _CHECKPOINT:
        frame = frame.f_back
    keeps = True if frame is None else bool(frame.f_locals.get("preserve", True))
    while frame is not None and not is_user_code(frame.f_code):
        frame = frame.f_back
    called = None if frame is None else site_of(frame)
    return Difference(shape, None if inner is None else site_of(inner), called, keeps)
