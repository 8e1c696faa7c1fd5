"""A sink that fails is reported once and left out; the others, and the run, never notice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from safeloop.faults import Fault
from safeloop.sinks.fanout import Fanout, open_sinks
from safeloop.sinks.jsonl import JsonLines
from safeloop.sinks.record import Record, RunInfo

FAULT = Fault("SL501", "non-finite gradient", "two")
METHODS = ("write", "fault", "flush", "close", "progress")


def record(step: int) -> Record:
    return Record(step, "train", {"loss/train": 1.0}, 0, 0.0)


class Memory:
    """A sink and its writer in one: keeps the calls, and fails in the method named."""

    type = "memory"

    def __init__(self, fails_in: str = "", error: BaseException | None = None) -> None:
        self.fails_in = fails_in
        self.error = error or OSError(28, "No space left on device\x1b[2J")
        self.calls: list[tuple[Any, ...]] = []

    def open(self, run: RunInfo) -> Memory:
        self._note("open", run.name)
        return self

    def write(self, record: Record) -> None:
        self._note("write", record.step)

    def progress(self, step: int, scalars: Mapping[str, float]) -> None:
        self._note("progress", step)

    def fault(self, fault: Fault, step: int, count: int) -> None:
        self._note("fault", fault.code, step, count)

    def flush(self) -> None:
        self._note("flush")

    def close(self, outcome: str) -> None:
        self._note("close", outcome)

    def _note(self, name: str, *details: Any) -> None:
        self.calls.append((name, *details))
        if name == self.fails_in:
            raise self.error


def drive(fanout: Fanout) -> None:
    for step in (1, 2):
        fanout.progress(step, {})
        fanout.write(record(step))
        fanout.fault(FAULT, step, step)
        fanout.flush()
    fanout.close("finished")


STEPS = [[("progress", n), ("write", n), ("fault", "SL501", n, n), ("flush",)] for n in (1, 2)]
HEALTHY = [("open", "digits"), *STEPS[0], *STEPS[1], ("close", "finished")]


@pytest.mark.parametrize("method", ["open", *METHODS])
def test_a_failing_sink_is_reported_once_and_its_neighbours_get_everything(
    run: RunInfo, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    before, failing, after = Memory(), Memory(fails_in=method), Memory()
    fanout = open_sinks([before, failing, after], run)
    drive(fanout)

    assert before.calls == after.calls == HEALTHY
    (problem,) = fanout.problems
    assert problem.startswith("sink 'memory' failed while ")
    assert "No space left on device\\x1b[2J" in problem
    assert capsys.readouterr().err == f"safeloop: {problem}\n"
    assert [call[0] for call in failing.calls].count(method) <= 2
    assert failing.calls[-1] == {"open": ("open", "digits")}.get(method, ("close", "dropped"))


def test_a_second_close_does_nothing(run: RunInfo) -> None:
    sink = Memory()
    fanout = open_sinks([sink], run)
    fanout.close("finished")
    fanout.close("failed")
    fanout.write(record(1))
    fanout.progress(1, {})

    assert sink.calls == [("open", "digits"), ("close", "finished")]


@pytest.mark.parametrize("method", ["open", "write", "progress"])
def test_a_keyboard_interrupt_is_not_taken_for_a_failing_sink(run: RunInfo, method: str) -> None:
    fanout = Fanout()
    with pytest.raises(KeyboardInterrupt):
        fanout.open(Memory(fails_in=method, error=KeyboardInterrupt()), run)
        drive(fanout)

    assert fanout.problems == []


def test_a_full_disk_costs_the_log_and_not_the_run(run: RunInfo) -> None:
    run.dir.mkdir(parents=True)
    (run.dir / "metrics.jsonl").symlink_to("/dev/full")
    other = Memory()

    fanout = open_sinks(["jsonl", other], run)
    drive(fanout)

    assert other.calls == HEALTHY
    assert len(fanout.problems) == 1
    assert "No space left on device" in fanout.problems[0]


def test_a_run_folder_that_cannot_be_made_costs_the_files_and_not_the_run(run: RunInfo) -> None:
    run.dir.parent.write_text("a file, not a folder")

    fanout = open_sinks(["tensorboard", "jsonl"], run)
    drive(fanout)

    assert [problem.split("'")[1] for problem in fanout.problems] == ["tensorboard", "jsonl"]
    assert all("while opening" in problem for problem in fanout.problems)


def test_names_and_configs_open_the_same_sinks(run: RunInfo, capsys: pytest.CaptureFixture[str]) -> None:
    fanout = open_sinks(["tensorboard", "console", JsonLines()], run)
    fanout.write(record(1))
    fanout.close("finished")

    assert fanout.problems == []
    assert sorted(path.name.split(".")[0] for path in Path(run.dir).iterdir()) == ["events", "metrics"]
    assert "digits finished" in capsys.readouterr().out
