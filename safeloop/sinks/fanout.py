"""Every record to every sink. A sink that fails is reported once and left out; it never ends a run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from safeloop.faults import Fault, printable
from safeloop.sinks.record import DROPPED, Record, RunInfo, ShowsProgress, Sink, Writer
from safeloop.sinks.union import DEFAULTS, SinkName


class Fanout:
    """The open sinks of a run, with the methods of one `Writer`. None of them raises because of a sink.

    `problems` holds one line for each sink that failed.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._writers: list[tuple[str, Writer]] = []
        self._watching: list[ShowsProgress] = []

    def open(self, sink: Sink, run: RunInfo) -> None:
        """Open one more sink."""
        try:
            writer = sink.open(run)
        except Exception as error:
            self._report(sink.type, "opening", error)
        else:
            self._writers.append((sink.type, writer))
            self._watch()

    def write(self, record: Record) -> None:
        """Hand a record to every sink."""
        self._each("writing", lambda writer: writer.write(record))

    def progress(self, step: int, scalars: Mapping[str, float]) -> None:
        """Tell the sinks that show progress. Cheap enough for every step."""
        for writer in self._watching:
            try:
                writer.progress(step, scalars)
            except Exception as error:
                self._drop(writer, "showing progress", error)

    def fault(self, fault: Fault, step: int, count: int = 1) -> None:
        """Hand a fault to every sink: once when it is found, again only to say that it happened more often."""
        self._each("writing a fault", lambda writer: writer.fault(fault, step, count))

    def flush(self) -> None:
        """Flush every sink."""
        self._each("flushing", lambda writer: writer.flush())

    def close(self, outcome: str) -> None:
        """Close every sink; a second call does nothing. `outcome` is `finished`, or what ended the run instead."""
        self._each("closing", lambda writer: writer.close(outcome))
        self._writers = []
        self._watch()

    def _each(self, action: str, call: Callable[[Writer], None]) -> None:
        for _, writer in self._writers:
            try:
                call(writer)
            except Exception as error:
                self._drop(writer, action, error)

    def _drop(self, failed: object, action: str, error: Exception) -> None:
        name, writer = next(pair for pair in self._writers if pair[1] is failed)
        self._writers = [pair for pair in self._writers if pair[1] is not failed]
        self._watch()
        with suppress(Exception):
            writer.close(DROPPED)
        self._report(name, action, error)

    def _watch(self) -> None:
        self._watching = [writer for _, writer in self._writers if isinstance(writer, ShowsProgress)]

    def _report(self, name: str, action: str, error: Exception) -> None:
        cause = printable(f"{type(error).__name__}: {error}")
        problem = f"sink '{name}' failed while {action} and is left out from here on: {cause}"
        self.problems.append(problem)
        with suppress(OSError, ValueError):
            print(f"safeloop: {problem}", file=sys.stderr, flush=True)


def open_sinks(specs: Sequence[SinkName | Sink], run: RunInfo) -> Fanout:
    """Open the sinks of `log.sinks`, each a bare name or a config, for one run."""
    fanout = Fanout()
    for spec in specs:
        fanout.open(DEFAULTS[spec] if isinstance(spec, str) else spec, run)
    return fanout
