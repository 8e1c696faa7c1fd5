"""The gradients of one phase on one window of micro-batches, under what conditions one likes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from safeloop.assembly import Assembly
from safeloop.evaluation import preserved
from safeloop.evaluation.preserved import batch_preserved
from safeloop.faults import FaultError
from safeloop.ingredients import Ingredients, PhaseMethod
from safeloop.seeds import RngState, rng_state
from safeloop.step.report import Frame, StepReport

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""relative difference of gradients that rounding alone explains, by the format of the parameters"""

_OTHER_SEED = 20261122
"""with the random numbers of the micro-batches, the masks of one big batch could be the same by accident"""

Gradients = dict[str, list[Tensor]]
"""owner -> a gradient for each of its parameters"""


class Window:
    """One phase, and the micro-batches of one window as they are and as one big batch."""

    def __init__(self, given: Ingredients, run: Assembly, phase: PhaseMethod, batches: Sequence[Any], big: Any) -> None:
        self.given = given
        self.phase = phase
        self.batches = batches
        self.big = big
        self.draws = False
        """whether the last gradients needed random numbers"""
        names = tuple(run.owners) if phase.trains is None else tuple(phase.trains)
        self.tolerances = {name: _tolerance(run.owners[name].tensors) for name in names}
        self._reader = run.readers[phase.name]
        self._trained = {name: run.owners[name].tensors for name in names}
        self._tensors = [tensor for owner in run.owners.values() for tensor in owner.tensors]

    def accumulated(self, shares: Sequence[float], still: Sequence[nn.Module] = ()) -> Gradients:
        """The micro-batches one after the other, each weighted by its share; `still` modules are in eval mode."""
        return self._gradients(self.batches, shares, still)

    def full(self, still: Sequence[nn.Module] = ()) -> Gradients:
        """The one big batch, with random numbers of its own."""
        return self._gradients([self.big], None, still, seed=_OTHER_SEED)

    def alone(self, batch: Any, still: Sequence[nn.Module] = ()) -> Gradients:
        """One micro-batch with weight 1."""
        return self._gradients([batch], None, still)

    def apart(self, shares: Sequence[float], still: Sequence[nn.Module] = ()) -> float:
        """The largest difference of an owner between both, in tolerances."""
        ours, full = self.accumulated(shares, still), self.full(still)
        return max(difference(ours[name], full[name]) / self.tolerances[name] for name in full)

    def _gradients(
        self,
        batches: Sequence[Any],
        shares: Sequence[float] | None,
        still: Sequence[nn.Module],
        seed: int | None = None,
    ) -> Gradients:
        with ExitStack() as stack:
            stack.enter_context(preserved(self.given.model, seed=seed))
            stack.enter_context(_set_aside(self._tensors, [t for own in self._trained.values() for t in own]))
            for batch in batches:
                stack.enter_context(batch_preserved(batch))
            for module in still:
                module.training = False
            before = rng_state()
            with torch.enable_grad():
                for index, batch in enumerate(batches):
                    self._backward(batch, None if shares is None else shares[index])
            self.draws = not _is_same(before, rng_state())
            return {name: [_gradient(tensor) for tensor in own] for name, own in self._trained.items()}

    def _backward(self, batch: Any, share: float | None) -> None:
        frame = Frame(StepReport(0), share=share)
        returned = self._reader.due(self.phase.losses(batch), 0)
        if not self._reader.read(returned, frame):
            faults = self._reader.faults(returned, is_first=False)
            if errors := [fault for fault in faults if fault.severity == "error"]:
                raise FaultError(errors[0], errors[1:])
            self._reader.read_unusual(returned, frame)
        if frame.roots:
            torch.autograd.backward(frame.roots, frame.seeds)


def difference(ours: Sequence[Tensor], full: Sequence[Tensor]) -> float:
    """Norm of the difference / norm of `full`, in float64; where `full` is zero, infinite or 0."""
    apart = _norm([a - b for a, b in zip(ours, full, strict=True)])
    return apart / size if (size := _norm(full)) else (float("inf") if apart else 0.0)


def ratio(ours: Sequence[Tensor], full: Sequence[Tensor]) -> float:
    """Norm of `ours` / norm of `full`; 1 where both are zero."""
    mine = _norm(ours)
    return mine / size if (size := _norm(full)) else (float("inf") if mine else 1.0)


def _norm(gradients: Sequence[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(g, dtype=_wide(g))) for g in gradients))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64


def _gradient(tensor: Tensor) -> Tensor:
    if tensor.grad is None:
        return torch.zeros_like(tensor)
    gradient = tensor.grad.detach()
    return gradient.clone() if gradient.layout is torch.strided else gradient.to_dense()


def _tolerance(tensors: Sequence[Tensor]) -> float:
    return max((TOLERANCES.get(tensor.dtype.to_real(), 1e-5) for tensor in tensors), default=1e-5)


def _is_same(before: RngState, after: RngState) -> bool:
    return (
        torch.equal(before.torch, after.torch)
        and all(torch.equal(a, b) for a, b in zip(before.cuda, after.cuda, strict=False))
        and repr(before.numpy) == repr(after.numpy)
        and before.python == after.python
    )


@contextmanager
def _set_aside(tensors: Sequence[nn.Parameter], trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Without `.grad`, and frozen where the phase does not train them; afterwards as before."""
    saved = [(tensor, tensor.requires_grad, tensor.grad) for tensor in tensors]
    kept = {id(tensor) for tensor in trained}
    try:
        for tensor, _, _ in saved:
            tensor.grad = None
            if id(tensor) not in kept:
                tensor.requires_grad_(False)
        yield
    finally:
        for tensor, requires_grad, grad in saved:
            tensor.requires_grad_(requires_grad)
            tensor.grad = grad
