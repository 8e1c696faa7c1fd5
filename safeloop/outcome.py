"""How a run ended, and what there is to say of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safeloop.audit.ledger import FaultLedger
from safeloop.checks.config.training import AverageNeverTaken
from safeloop.checks.data.source import DataEndedEarly
from safeloop.config import RunConfig
from safeloop.faults import Fault


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    steps: int
    epochs: int
    metrics: dict[str, float]
    """of the last evaluation"""
    losses: dict[str, float]
    """loss term -> its value at the last log; `train` is their weighted sum"""
    faults: tuple[Fault, ...]
    dir: Path | None
    outcome: str
    """`finished`, or `data ended` where the data ran out before `max_steps`"""
    seconds: float


def outcome_of(config: RunConfig, steps: int, ledger: FaultLedger, *, has_averaged: bool) -> str:
    """`finished` or `data ended`, of a run whose loop is over; what went wrong with its end goes into the ledger."""
    max_steps = config.max_steps
    if config.average is not None and not has_averaged and steps:
        ledger.add([_never_averaged(steps)], steps)
    if max_steps is None or steps >= max_steps or config.run.max_epochs is not None:
        return "finished"
    ledger.add([_ended_early(steps, max_steps)], steps)
    return "data ended"


def _never_averaged(steps: int) -> Fault:
    return AverageNeverTaken.fault(
        f"the run ended after {steps} steps, and none of their weights were averaged",
        where="average",
        fix="lower `average.start`; the metrics are those of the live weights",
        severity="warning",
    )


def _ended_early(steps: int, max_steps: int) -> Fault:
    return DataEndedEarly.fault(
        f"the data ended after {steps} of {max_steps} steps, and it can be read only once",
        where="data.train",
        fix=f"pass a list, a Dataset or a DataLoader, which can be read again, or set `run.max_steps` to {steps}",
    )
