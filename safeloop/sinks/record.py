"""What a sink is given: the run, its records, and the methods that a writer has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from safeloop.faults import Fault

FINISHED = "finished"
"""The outcome of a run that reached its last step. Any other (`failed`, `interrupted`, ...) means that it did not."""

DROPPED = "dropped"
"""Given to `close` by `Fanout` when this sink failed while the run goes on: let go of resources, say nothing."""


@dataclass(frozen=True, slots=True)
class Record:
    """The readings of one logging interval, or of one evaluation, already on the host."""

    step: int
    kind: Literal["train", "eval"]
    scalars: Mapping[str, float]
    """tag -> value; a tag has at least one slash (`loss/train`, `grad/main/pre_clip`)"""
    epoch: int
    wall_time: float
    """seconds since 1970"""


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a sink knows of a run before its first step."""

    name: str
    dir: Path
    max_steps: int | None
    plan: str
    config: str
    """the resolved config as YAML"""
    owners: tuple[str, ...]
    modules: tuple[str, ...]
    """names of the modules that have parameters, in the order of the model"""
    hparams: Mapping[str, str | int | float | bool] = field(default_factory=dict)


class Writer(Protocol):
    """An open sink. Its methods may raise: `Fanout` reports that once and goes on without it."""

    def write(self, record: Record) -> None:
        """Take one record."""

    def fault(self, fault: Fault, step: int, count: int) -> None:
        """Take a fault. `count` is how often it has happened so far; the same fault may come again with more."""

    def flush(self) -> None:
        """Hand everything taken so far to the operating system."""

    def close(self, outcome: str) -> None:
        """Flush and let go of every resource. `outcome` is `finished`, or what ended the run instead."""


@runtime_checkable
class ShowsProgress(Protocol):
    """A writer that wants to hear of every step. The call must cost next to nothing."""

    def progress(self, step: int, scalars: Mapping[str, float]) -> None:
        """Step `step` is done; `scalars` holds the readings that happen to be on the host, often none."""


class Sink(Protocol):
    """The config of a writer."""

    @property
    def type(self) -> str:
        """Its name in `log.sinks`."""

    def open(self, run: RunInfo) -> Writer:
        """Start writing for a run."""
