"""metrics.jsonl: one valid JSON object per line, whatever the numbers are."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safeloop.faults import Fault
from safeloop.sinks.jsonl import JsonLines
from safeloop.sinks.record import Record, RunInfo


def strict(line: str) -> dict[str, Any]:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    loaded: dict[str, Any] = json.loads(line, parse_constant=refuse)
    return loaded


def lines(run: RunInfo) -> list[dict[str, Any]]:
    return [strict(line) for line in (run.dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_each_record_and_each_fault_is_one_line_in_the_order_of_writing(run: RunInfo) -> None:
    fault = Fault("SL501", "non-finite gradient", "two\nlines", where="`é`", fix="do", severity="warning")
    writer = JsonLines().open(run)
    writer.write(Record(50, "train", {"loss/train": 0.1, "grad/main/pre_clip": 2.0}, 3, 1.5))
    writer.fault(fault, 60, 17)
    writer.write(Record(60, "eval", {"metric/accuracy": 0.5}, 4, 2.5))

    train, found, evaluation = lines(run)
    writer.close("finished")

    head = {"kind": "train", "step": 50, "epoch": 3, "wall_time": 1.5}
    assert train == head | {"loss/train": 0.1, "grad/main/pre_clip": 2.0}
    assert evaluation == {"kind": "eval", "step": 60, "epoch": 4, "wall_time": 2.5, "metric/accuracy": 0.5}
    assert {key: found[key] for key in ("kind", "step", "count")} == {"kind": "fault", "step": 60, "count": 17}
    parts = ("code", "title", "what", "where", "why", "fix", "severity")
    assert {key: found[key] for key in parts} == {key: getattr(fault, key) for key in parts}


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.dictionaries(st.text(min_size=1).map("metric/{}".format), st.floats(), max_size=5))
def test_every_float_comes_back_exactly(run: RunInfo, scalars: dict[str, float]) -> None:
    writer = JsonLines().open(run)
    writer.write(Record(1, "train", scalars, 0, 0.0))
    writer.close("finished")

    found = lines(run)[-1]

    for tag, value in scalars.items():
        assert float(found[tag]) == value or (math.isnan(value) and found[tag] == "NaN")
        assert isinstance(found[tag], str) != math.isfinite(value)


def test_only_the_owner_can_read_it(run: RunInfo) -> None:
    JsonLines().open(run).close("finished")

    assert stat.S_IMODE(run.dir.stat().st_mode) == 0o700
    assert stat.S_IMODE((run.dir / "metrics.jsonl").stat().st_mode) == 0o600


def test_a_folder_that_exists_keeps_its_mode_and_its_lines(run: RunInfo) -> None:
    run.dir.mkdir(parents=True, mode=0o755)
    mode = stat.S_IMODE(run.dir.stat().st_mode)
    for step in (1, 2):
        writer = JsonLines().open(run)
        writer.write(Record(step, "train", {}, 0, 0.0))
        writer.close("finished")

    assert stat.S_IMODE(run.dir.stat().st_mode) == mode
    assert [line["step"] for line in lines(run)] == [1, 2]
    assert [path.name for path in Path(run.dir).iterdir()] == ["metrics.jsonl"]
