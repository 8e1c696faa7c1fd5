"""Runs a refused turn again, bitwise, and finds where its NaN or infinity was born."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from safeloop.audit.untouched import untouched
from safeloop.autograd.walk import reach
from safeloop.checks.stages import gradient_faults
from safeloop.checks.views import GradientsView
from safeloop.data.structure import tensors
from safeloop.faults import Fault
from safeloop.nonfinite import Birth, Locator
from safeloop.nonfinite.reading import kind_of
from safeloop.seeds import rng_state
from safeloop.step.report import Frame, StepReport
from safeloop.step.turn import Turn


@dataclass
class Diagnosis:
    """What a replay of a turn found."""

    phase: str
    micro_batch: int = 0
    num_micro_batches: int = 1
    term_births: dict[str, Birth | None] = field(default_factory=dict)
    """loss term that is not finite itself -> the birth that reached it"""
    gradient_terms: tuple[str, ...] = ()
    """loss terms that are finite and whose gradient is not"""
    gradient_birth: Birth | None = None
    faults: Sequence[Fault] = ()
    """what the finite check says of the replay"""
    note: str = ""
    """why the replay is not what the turn was; empty where it is bitwise the same"""
    error: Exception | None = None
    """what the replay ended in before it was through"""

    @property
    def is_found(self) -> bool:
        """Whether the replay met NaN or infinity too."""
        return bool(self.term_births or self.gradient_terms or self.gradient_birth)


def diagnose(model: nn.Module, turn: Turn, step: int, expected: Mapping[str, Tensor]) -> Diagnosis:
    """Run a turn again under the locator, one backward pass for each loss term. Everything is then as it was.

    The gradients of the terms are computed apart, so that their sum may differ from the turn's in the last bits; the
    terms themselves are compared bit by bit.

    Args:
        model: with the weights and buffers from before the turn's update.
        turn: what was kept of it.
        step: its number.
        expected: the values of its loss terms.
    """
    found = Diagnosis(turn.rerun.phase, num_micro_batches=len(turn.window))
    try:
        with warnings.catch_warnings(), untouched(model, turn.rerun, turn.window):
            warnings.simplefilter("ignore")  # all of it was seen before
            _set_step(turn, step)
            turn.random.restore()
            if turn.rerun.keeper is not None:
                turn.rerun.keeper.restore()
            before = rng_state()
            frame = Frame(StepReport(step))
            _run(model, turn, frame, found)
            is_random_known = turn.random.covers(before, rng_state())
            found.note = _difference(expected, frame.terms, found, is_random_known=is_random_known)
    except Exception as error:  # the user's code, run once more than it expects: the fault must not be lost for that
        found.error = error
        found.note = f"a replay of the step ended in {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return found


def _set_step(turn: Turn, step: int) -> None:
    """The number that the loss function saw: the check may come one step later."""
    owner: Any = getattr(turn.rerun.losses, "__self__", None)
    if isinstance(getattr(owner, "step", None), int):
        owner.step = step


def _run(model: nn.Module, turn: Turn, frame: Frame, found: Diagnosis) -> None:
    rerun, window = turn.rerun, turn.window
    shares: Sequence[float | None] = [None] if len(window) == 1 else rerun.shares(window)
    totals: dict[str, Tensor] = {}
    for index, (batch, share) in enumerate(zip(window, shares, strict=True)):
        frame.batch, frame.share = batch, share
        if found.is_found:
            rerun.forward(frame)  # for the values alone
        else:
            found.micro_batch = index
            with Locator(model, batch=dict(tensors(batch)), top=sys._getframe()) as locator:
                rerun.forward(frame)
                _look_at_terms(locator, frame, found)
                if not found.is_found:
                    _look_at_gradients(locator, turn, frame, totals, found)
        frame.roots, frame.seeds, frame.root_names = [], [], []
    parameters = rerun.parameters
    for name, total in totals.items():
        parameters[name].grad = total
    where = f"step {frame.report.step}, {frame.source}"
    found.faults = gradient_faults(GradientsView(parameters, frame.terms, frame.report.step, where))


def _look_at_terms(locator: Locator, frame: Frame, found: Diagnosis) -> None:
    values: dict[str, Tensor] = frame.terms | dict(zip(frame.root_names, frame.roots, strict=True))
    for name, value in values.items():
        if kind_of(value) is not None:
            found.term_births[name] = locator.cause([value], (name,))


def _look_at_gradients(locator: Locator, turn: Turn, frame: Frame, totals: dict[str, Tensor], found: Diagnosis) -> None:
    for term, gradients in _by_term(turn, frame):
        if any(gradient is not None and kind_of(gradient) is not None for gradient in gradients.values()):
            if found.gradient_birth is None:
                found.gradient_birth = locator.cause(gradients.values(), (term,), terms_are_finite=True)
            found.gradient_terms = (*found.gradient_terms, term)
        for name, gradient in gradients.items():
            if gradient is not None:
                totals[name] = totals[name] + gradient if name in totals else gradient
    if not found.is_found:  # each is finite by itself: their sum may have overflowed
        found.gradient_birth = locator.cause(totals.values(), tuple(frame.root_names), terms_are_finite=True)


def _by_term(turn: Turn, frame: Frame) -> Iterator[tuple[str, dict[str, Tensor | None]]]:
    """Each term with its gradients, by parameter; all terms at once where a re-entrant checkpoint hides parameters."""
    rerun = turn.rerun
    seeds = rerun.seeds(frame.seeds)
    if frame.roots and not all(reach(root).is_complete for root in frame.roots):
        torch.autograd.backward(frame.roots, list(seeds))
        gradients = {name: p.grad for name, p in rerun.parameters.items()}
        for parameter in rerun.parameters.values():
            parameter.grad = None
        yield "`, `".join(frame.root_names), gradients
        return
    for name, root, seed in zip(frame.root_names, frame.roots, seeds, strict=True):
        if trained := rerun.trained_by(name):
            found = torch.autograd.grad(root, list(trained.values()), seed, retain_graph=True, allow_unused=True)
            yield name, dict(zip(trained, found, strict=True))


def _difference(
    expected: Mapping[str, Tensor], values: Mapping[str, Tensor], found: Diagnosis, *, is_random_known: bool
) -> str:
    """In what the replay differs from the turn; empty where it does not."""
    for name, value in expected.items():
        if name not in values or not _is_same(value, values[name]):
            other = f"{float(values[name]):.6g}" if name in values else "missing"
            what = f"a replay of the step gave other values (`{name}` {other} instead of {float(value):.6g})"
            return what + (": " + _REASONS if is_random_known else ": " + _UNKNOWN)
    return (
        "" if found.is_found else f"a replay of the step, with the same values, met no NaN and no infinity: {_REASONS}"
    )


_REASONS = (
    "something beyond the batch, the weights, the buffers and the random state has a say in it (state that the loss "
    "function keeps, a batch that it edits in place, a random generator of its own, a non-deterministic kernel)"
)
_UNKNOWN = "random numbers were drawn for the first time in these steps, and their state was not kept"


def _is_same(one: Tensor, other: Tensor) -> bool:
    one, other = one.detach().to(other.device), other.detach()
    return one.dtype == other.dtype and bool(((one == other) | (one.isnan() & other.isnan())).all())
