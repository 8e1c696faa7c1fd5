"""Compares the gradients of accumulated micro-batches with those of one big batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from safeloop.accumulation.causes import fault, few
from safeloop.accumulation.passes import Window, difference, ratio
from safeloop.assembly import Assembly, shares_by
from safeloop.checks.update.accumulation import NothingToCompare
from safeloop.data.join import CannotJoin, joined
from safeloop.data.move import Mover
from safeloop.faults import Fault
from safeloop.ingredients import Ingredients
from safeloop.stream import Stream


@dataclass(frozen=True)
class AccumulationReport:
    """How accumulated gradients compare with those of one big batch; `str` is for people."""

    sizes: tuple[int, ...]
    """samples in each micro-batch of the window"""
    shares: tuple[float, ...]
    """the part of the window that each micro-batch counts as"""
    differences: dict[str, float]
    """owner -> norm of the difference / norm of the big batch's gradient; of several phases, the largest"""
    ratios: dict[str, float]
    """owner -> norm of the accumulated gradient / norm of the big batch's"""
    tolerances: dict[str, float]
    """owner -> the largest difference that counts as equal"""
    faults: tuple[Fault, ...] = ()

    @property
    def is_equal(self) -> bool:
        """Whether every owner's difference is within its tolerance."""
        return all(difference <= self.tolerances[name] for name, difference in self.differences.items())

    def __str__(self) -> str:
        window = f"window of {len(self.sizes)} micro-batches: {few(self.sizes)} samples, weights {few(self.shares)}"
        lines = [
            f"{name}: relative difference {difference:.1e} (at most {self.tolerances[name]:g}), "
            f"norm accumulated / one batch {self.ratios[name]:.6g}"
            for name, difference in self.differences.items()
        ]
        return "\n".join([window, *lines])


def compare_accumulation(given: Ingredients, run: Assembly) -> AccumulationReport:
    """Compare both on the first window of the data, autocast off; afterwards everything is bitwise as before.

    Cost: each sample of the window goes forward and backward twice; up to nine times where something differs.

    Raises:
        FaultError: SL614, there is nothing to compare; or what a loss term gets wrong.
    """
    window = _first_window(given, run)
    try:
        big = joined(window)
    except CannotJoin as error:
        raise NothingToCompare.error(
            f"the micro-batches of the first window do not make one big batch: {error}",
            where="data.train",
            fix="let the data give micro-batches that differ in their first dimension alone: padded to one length",
        ) from error
    shares = shares_by(given)(window)
    differences: dict[str, float] = {}
    ratios: dict[str, float] = {}
    tolerances: dict[str, float] = {}
    faults = []
    for phase in given.phases:
        measured = Window(given, run, phase, window, big)
        ours, full = measured.accumulated(shares), measured.full()
        found = {name: difference(ours[name], full[name]) for name in full}
        sizes = {name: ratio(ours[name], full[name]) for name in full}
        tolerances |= measured.tolerances
        for name in found:
            if not found[name] < differences.get(name, 0.0):
                differences[name], ratios[name] = found[name], sizes[name]
        if any(not found[name] <= measured.tolerances[name] for name in found):
            faults.append(fault(measured, found, sizes, shares))
    return AccumulationReport(
        tuple(map(given.count, window)), tuple(shares), differences, ratios, tolerances, tuple(faults)
    )


def _first_window(given: Ingredients, run: Assembly) -> list[Any]:
    """The first window of the data, which training gets all the same."""
    wanted = given.config.accumulate.micro_batches
    if wanted == 1:
        raise NothingToCompare.error(
            "`accumulate.micro_batches` is 1: every micro-batch is a batch of its own",
            where=given.loaded.where("accumulate.micro_batches") or "accumulate.micro_batches",
            fix="set `accumulate.micro_batches` to the number that you want to accumulate",
        )
    if given.data.is_one_shot:
        window = run.stream.window(wanted)
        run.stream.put_back(window)
    else:
        window = Stream(given.data, Mover(run.device), given.count, 1).window(wanted)
    if len(window) < 2:
        raise NothingToCompare.error(
            f"the first window holds {len(window)} micro-batch: the first epoch of the data ends there",
            where="data.train",
            fix="make `data.batch_size` smaller, or leave `accumulate.micro_batches` at 1",
        )
    return window
