"""The end of the data, at the beginning of a step or inside it."""

from __future__ import annotations

from collections.abc import Iterable

from safeloop.checks.data.source import DataEndedInsideAStep
from safeloop.faults import Fault
from safeloop.step.report import StepReport


class DataEnded(Exception):
    """There is no further micro-batch: the last epoch is over, or the data can be read only once."""


def half_done(report: StepReport, owners: Iterable[str]) -> list[Fault]:
    """A fault where a step that the end of the data broke off had updated something already."""
    if not report.updated:
        return []
    done = [name for name in owners if name in report.updated]
    rest = [name for name in owners if name not in report.updated]
    missed = f", {_listed(rest)} not" if rest else ""
    return [
        DataEndedInsideAStep.fault(
            f"the data ended inside step {report.step}: {_listed(done)} updated{missed}; the step is not counted",
            where="data.train",
            why="how many micro-batches are left could not be known when the step began",
            fix=f"give data with a length, or set `run.max_steps` to {report.step}",
            names=done,
        )
    ]


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
