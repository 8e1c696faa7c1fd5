"""TensorBoard: one Event per record, a dashboard, and the plan, the config and the faults as text."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from safeloop.component import Component, Float, Int
from safeloop.faults import Fault
from safeloop.sinks.dashboard import band, categories
from safeloop.sinks.record import FINISHED, Record, RunInfo

if TYPE_CHECKING:
    from safeloop.sinks.eventfile import EventFile

_PORT = 6006


class TensorBoard(Component):
    """Writes an event file into the run folder. Cost: 10 us and 4.5 us a scalar, once per logging interval."""

    type: Literal["tensorboard"] = "tensorboard"
    flush_every: Int = Field(default=50, ge=1)
    """records that may wait in memory; a kill loses at most these"""
    flush_s: Float = Field(default=5.0, ge=0)
    """seconds after which the next record is written at once, so that a dashboard beside a slow run keeps up"""

    def open(self, run: RunInfo) -> TensorBoardWriter:
        """Create the event file; tensorboard is imported here and not before (0.2 s)."""
        from safeloop.sinks.eventfile import EventFile

        return TensorBoardWriter(self, run, EventFile(run.dir))


class TensorBoardWriter:
    """An open event file. Flushed with new tags, faults, evaluations, every `flush_every` records, and at the end."""

    def __init__(self, config: TensorBoard, run: RunInfo, file: EventFile) -> None:
        from safeloop.sinks import summaries

        self._config, self._run, self._file, self._make = config, run, file, summaries
        self._tags: dict[str, None] = {}
        self._waiting = 0
        self._has_table = False
        file.add(summaries.text("plan", run.plan), 0)
        file.add(summaries.text("config", run.config, "yaml"), 0)
        file.add(summaries.hparams_start(run.hparams), 0)
        self.flush()

    def write(self, record: Record) -> None:
        """One Event with all scalars of the record and the band over its modules. New tags extend the dashboard."""
        values = {**record.scalars, **band(record.scalars)}
        self._file.add(self._make.scalars(values), record.step, record.wall_time)
        self._waiting += 1
        is_new = not values.keys() <= self._tags.keys()
        if is_new:
            self._tags |= dict.fromkeys(values)
            self._file.add(self._make.layout(categories(self._tags, self._run.modules)), record.step)
        if record.kind == "eval":
            self._write_table()
        is_late = time.monotonic() - self._flushed_at >= self._config.flush_s
        if is_new or is_late or record.kind == "eval" or self._waiting >= self._config.flush_every:
            self.flush()

    def fault(self, fault: Fault, step: int, count: int) -> None:
        """The fault as text under the tag `faults`, at its step."""
        times = f"\n\n{count} times up to step {step}" if count > 1 else ""
        self._file.add(self._make.text("faults", f"step {step}: {fault}{times}"), step)
        self.flush()

    def flush(self) -> None:
        """Append what waits to the event file."""
        self._file.flush()
        self._waiting = 0
        self._flushed_at = time.monotonic()

    def close(self, outcome: str) -> None:
        """Say how the run ended, and close the file."""
        self._write_table()
        self._file.add(self._make.hparams_end(is_success=outcome == FINISHED), 0)
        self._file.close()

    def _write_table(self) -> None:
        """The columns of the HParams tab, once: TensorBoard reads the first it finds, so the metrics must be known."""
        if not self._has_table:
            metrics = [tag for tag in self._tags if tag.startswith("metric/") or tag in ("loss/train", "loss/eval")]
            self._file.add(self._make.hparams_table(self._run.hparams, metrics), 0)
            self._has_table = True


def dashboard_text(run_dir: Path) -> str:
    """The command that serves the dashboard, on this machine only, and the address that opens it: two lines.

    The folder served is the one that holds the run, so that other runs appear beside it.
    """
    folder = shlex.quote(str(_shown(Path(run_dir).resolve().parent)))
    beside = Path(sys.executable).parent / "tensorboard"
    is_hidden = shutil.which("tensorboard") is None and beside.is_file()
    program = shlex.quote(str(_shown(beside))) if is_hidden else "tensorboard"
    command = f"{program} --logdir {folder} --host 127.0.0.1 --port {_PORT}"
    return f"{command}\nhttp://127.0.0.1:{_PORT}/#custom_scalars"


def _shown(path: Path) -> Path:
    """`path` from the current directory where it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
