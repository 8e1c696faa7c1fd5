"""JSON lines: `metrics.jsonl` in the run folder, one object per record and per fault."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from io import FileIO
from typing import Any, Literal

from safeloop.component import Component
from safeloop.faults import Fault
from safeloop.sinks.files import append_to, write_all
from safeloop.sinks.record import Record, RunInfo

FILE = "metrics.jsonl"


class JsonLines(Component):
    """Writes `metrics.jsonl`, one JSON object per line, each line complete on disk as soon as it is written.

    A record is `{"kind": "train" | "eval", "step", "epoch", "wall_time", <tag>: value, ...}`, a fault is
    `{"kind": "fault", "step", "count", ...}` with every part of the fault. JSON has no word for a number that is not
    finite: it becomes the string `"NaN"`, `"Infinity"` or `"-Infinity"`, which Python's `float()` and JavaScript's
    `Number()` read back.
    """

    type: Literal["jsonl"] = "jsonl"

    def open(self, run: RunInfo) -> JsonLinesWriter:
        """Open `metrics.jsonl` of the run folder for appending."""
        return JsonLinesWriter(append_to(run.dir / FILE))


class JsonLinesWriter:
    """An open `metrics.jsonl`."""

    def __init__(self, file: FileIO) -> None:
        self._file = file

    def write(self, record: Record) -> None:
        """One line, the tags as keys beside `kind`, `step`, `epoch` and `wall_time`."""
        head = {"kind": record.kind, "step": record.step, "epoch": record.epoch, "wall_time": record.wall_time}
        self._line(head | {tag: _valid(value) for tag, value in record.scalars.items()})

    def fault(self, fault: Fault, step: int, count: int) -> None:
        """One line with `kind: fault`."""
        self._line({"kind": "fault", "step": step, "count": count} | asdict(fault))

    def flush(self) -> None:
        """Nothing waits: every line was written at once."""

    def close(self, outcome: str) -> None:
        """Close the file."""
        self._file.close()

    def _line(self, content: dict[str, Any]) -> None:
        write_all(self._file, (json.dumps(content, allow_nan=False) + "\n").encode())


def _valid(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
