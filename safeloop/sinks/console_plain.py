"""Plain lines for pipes, files and logs: no control characters, no colour, each line complete."""

from __future__ import annotations

import time
from typing import TextIO

from safeloop.faults import Fault
from safeloop.sinks.console_status import Status, losses, optimizers, speed
from safeloop.sinks.record import FINISHED, Record, RunInfo


class PlainConsole:
    """Prints a line for training and one for evaluation, at most every `every_s` seconds, and the result."""

    def __init__(self, run: RunInfo, stream: TextIO, *, every_s: float, quiet: bool) -> None:
        self._status = Status(run)
        self._stream, self._every_s, self._quiet = stream, every_s, quiet
        self._due = {"train": 0.0, "eval": 0.0}

    def write(self, record: Record) -> None:
        """Remember the record; print a line if one is due."""
        self._status.take(record)
        self._print_faults(with_errors=True)
        now = time.monotonic()
        if not self._quiet and now >= self._due[record.kind]:
            self._due[record.kind] = now + self._every_s
            self._print(self._line(record))

    def fault(self, fault: Fault, step: int, count: int) -> None:
        """Print a warning now, an error once the run goes on."""
        self._status.take_fault(fault, step, count)
        self._print_faults(with_errors=False)

    def flush(self) -> None:
        """Nothing waits: every line is flushed."""

    def close(self, outcome: str) -> None:
        """Print the result block."""
        self._print_faults(with_errors=outcome == FINISHED)
        rows = self._status.result(outcome)
        if rows and not self._quiet:
            (heading, took), *rest = rows
            width = max(len(label) for label, _ in rest)
            self._print("\n".join([f"{heading}: {took}", *(f"  {label:<{width}}  {text}" for label, text in rest)]))

    def _line(self, record: Record) -> str:
        status, run = self._status, self._status.run
        at = f"{record.step}/{run.max_steps}" if run.max_steps else f"{record.step}"
        parts = [time.strftime("%H:%M:%S", time.localtime(record.wall_time)), status.name, f"step {at}"]
        parts += [f"{label} {text}" for label, text in losses(record.scalars)]
        for name, norm, lr in optimizers(record.scalars, run.owners, status.arrow):
            prefix = f"{name} " if len(run.owners) > 1 else ""
            parts += [f"{prefix}{label} {text}" for label, text in (("grad", norm), ("lr", lr)) if text]
        parts += [speed(record.scalars), status.left() if record.kind == "train" else ""]
        return "  ".join(filter(None, parts))

    def _print_faults(self, *, with_errors: bool) -> None:
        for _, text in self._status.news(with_errors=with_errors):
            self._print(text)

    def _print(self, text: str) -> None:
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        self._stream.flush()
