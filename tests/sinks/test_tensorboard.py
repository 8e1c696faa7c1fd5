"""The event file, read back with tensorboard's own loaders."""

from __future__ import annotations

import math
import re
import signal
import stat
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams import metadata as hparams_metadata

from safeloop.faults import Fault
from safeloop.sinks.dashboard import BAND, band
from safeloop.sinks.record import Record, RunInfo
from safeloop.sinks.tensorboard import TensorBoard, dashboard_text

FAULT = Fault("SL501", "non-finite gradient", "2 of 161 gradients hold NaN", where="step 12")


def float32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def record(step: int, *, kind: Any = "train", **extra: float) -> Record:
    scalars = {"loss/train": 1 / 3 / step, "grad/main/pre_clip": 2.5, "module/grad_norm/encoder.0": 0.1 * step}
    return Record(step, kind, scalars | extra, epoch=0, wall_time=1000.25 + step)


def event_file(run: RunInfo) -> Path:
    (path,) = run.dir.glob("events.out.tfevents.*")
    return path


def events(run: RunInfo) -> list[Any]:
    return list(LegacyEventFileLoader(str(event_file(run))).Load())


def scalar_events(run: RunInfo) -> list[Any]:
    return [event for event in events(run) if any(v.HasField("simple_value") for v in event.summary.value)]


def texts(run: RunInfo, tag: str) -> list[tuple[int, str]]:
    found = [(e.step, v) for e in events(run) for v in e.summary.value if v.tag == tag]
    assert all(value.metadata.plugin_data.plugin_name == "text" for _, value in found)
    return [(step, value.tensor.string_val[0].decode()) for step, value in found]


def layouts(run: RunInfo) -> list[Any]:
    values = [v for e in events(run) for v in e.summary.value if v.tag == "custom_scalars__config__"]
    return [layout_pb2.Layout.FromString(value.tensor.string_val[0]) for value in values]


def test_a_record_is_one_event_with_every_value_as_float32(run: RunInfo) -> None:
    odd = {"loss/tiny": 1e-50, "loss/huge": 1e300, "loss/inf": -math.inf, "loss/nan": math.nan, "loss/tenth": 0.1}
    records = [record(50), record(100, **odd), record(150, kind="eval")]
    writer = TensorBoard().open(run)
    for each in records:
        writer.write(each)
    writer.close("finished")

    found = scalar_events(run)

    assert [(event.step, event.wall_time) for event in found] == [(r.step, r.wall_time) for r in records]
    for event, each in zip(found, records, strict=True):
        values = {value.tag: value.simple_value for value in event.summary.value}
        assert list(values) == list(each.scalars)
        for tag, value in each.scalars.items():
            expected = math.copysign(math.inf, value) if abs(value) > 3.5e38 else float32(value)
            assert values[tag] == expected or (math.isnan(value) and math.isnan(values[tag])), tag


def test_tensorboard_reads_the_values_back(run: RunInfo) -> None:
    writer = TensorBoard().open(run)
    for step in range(1, 8):
        writer.write(record(step))
    writer.close("finished")

    reader = EventAccumulator(str(run.dir)).Reload()

    assert set(reader.Tags()["scalars"]) == set(record(1).scalars)
    assert [(s.step, s.value) for s in reader.Scalars("loss/train")] == [(s, float32(1 / 3 / s)) for s in range(1, 8)]
    assert set(reader.Tags()["tensors"]) >= {"plan", "config", "custom_scalars__config__"}


def test_three_modules_add_a_band_to_the_event(run: RunInfo) -> None:
    extra = {"module/grad_norm/encoder.2": 9.0, "module/grad_norm/head": 4.0}
    writer = TensorBoard().open(run)
    writer.write(record(1, **extra))
    writer.close("finished")

    (event,) = scalar_events(run)

    values = {value.tag: value.simple_value for value in event.summary.value}
    assert {tag: values[tag] for tag in BAND} == {BAND[0]: 4.0, BAND[1]: float32(0.1), BAND[2]: 9.0}
    assert band(record(1, **extra).scalars).keys() == set(BAND)


def test_the_layout_is_written_again_only_when_new_tags_appear(run: RunInfo) -> None:
    writer = TensorBoard().open(run)
    writer.write(record(50))
    writer.write(record(100))
    writer.write(Record(100, "eval", {"metric/accuracy": 0.5}, 0, 1.0))
    writer.write(record(150))
    writer.close("finished")

    first, last = layouts(run)

    assert "metric: accuracy" not in str(first)
    assert "metric: accuracy" in str(last)


def test_each_chart_matches_its_own_tags_and_no_others(run: RunInfo) -> None:
    tags = ["loss/train", "loss/eval", "loss/eval_", "loss/a+b", "metric/train", "module/grad_norm/encoder.1"]
    tags += ["module/grad_norm/encoder.10", "module/grad_norm/encoder_1", "grad/main/pre_clip", "grad/main/post_clip"]
    writer = TensorBoard().open(run)
    writer.write(Record(1, "train", dict.fromkeys(tags, 1.0), 0, 1.0))
    writer.close("finished")

    (layout,) = layouts(run)

    charts = [chart for category in layout.category for chart in category.chart]
    shown = [[tag for tag in tags if any(re.match(p, tag) for p in chart.multiline.tag)] for chart in charts]
    assert sorted(tag for matches in shown for tag in matches) == sorted(tags)
    assert all(
        len(matches) == len(chart.multiline.tag) for matches, chart in zip(shown, charts, strict=True) if matches
    )
    margins = [chart.margin.series[0] for chart in charts if chart.margin.series]
    assert [(m.value, m.lower, m.upper) for m in margins] == [BAND]


def test_plan_config_and_faults_are_text_word_for_word(run: RunInfo) -> None:
    fault = Fault("SL501", "non-finite gradient", "in ```sqrt```", fix="add eps")
    writer = TensorBoard().open(run)
    writer.fault(fault, 12, 1)
    writer.fault(FAULT, 900, 17)
    writer.close("failed")

    assert texts(run, "plan") == [(0, f"```\n{run.plan}\n```\n")]
    assert texts(run, "config") == [(0, f"```yaml\n{run.config.rstrip()}\n```\n")]
    assert texts(run, "faults") == [
        (12, f"````\nstep 12: {fault}\n````\n"),
        (900, f"```\nstep 900: {FAULT}\n\n17 times up to step 900\n```\n"),
    ]


@pytest.mark.parametrize(
    ("outcome", "status"), [("finished", api_pb2.STATUS_SUCCESS), ("interrupted", api_pb2.STATUS_FAILURE)]
)
def test_hyperparameters_and_the_end_stand_in_the_run_itself(run: RunInfo, outcome: str, status: int) -> None:
    writer = TensorBoard().open(run)
    writer.write(record(1))
    writer.write(Record(1, "eval", {"metric/accuracy": 0.5, "loss/eval": 1.0}, 0, 1.0))
    writer.write(Record(2, "eval", {"metric/accuracy": 0.6, "loss/eval": 1.0}, 0, 1.0))
    writer.close(outcome)

    content: dict[str, list[bytes]] = {}
    for value in (v for e in events(run) for v in e.summary.value if v.tag.startswith("_hparams_")):
        content.setdefault(value.tag, []).append(value.metadata.plugin_data.content)

    assert all(len(found) == 1 for found in content.values())
    start = hparams_metadata.parse_session_start_info_plugin_data(content["_hparams_/session_start_info"][0])
    table = hparams_metadata.parse_experiment_plugin_data(content["_hparams_/experiment"][0])
    end = hparams_metadata.parse_session_end_info_plugin_data(content["_hparams_/session_end_info"][0])
    assert {name: getattr(v, v.WhichOneof("kind")) for name, v in start.hparams.items()} == dict(run.hparams)
    assert start.hparams["fused"].WhichOneof("kind") == "bool_value"
    assert [info.name for info in table.hparam_infos] == list(run.hparams)
    assert {info.name.tag for info in table.metric_infos} == {"loss/train", "loss/eval", "metric/accuracy"}
    assert end.status == status
    assert [path for path in run.dir.parent.rglob("*") if path.is_dir()] == [run.dir]


@pytest.mark.parametrize("call", ["fault", "flush", "evaluate", "new tag"])
def test_what_matters_is_on_disk_at_once(run: RunInfo, call: str) -> None:
    writer = TensorBoard(flush_every=1000, flush_s=1e9).open(run)
    writer.write(record(1))
    writer.write(record(2))
    assert [event.step for event in scalar_events(run)] == [1]
    if call == "fault":
        writer.fault(FAULT, 2, 1)
    elif call == "flush":
        writer.flush()
    elif call == "evaluate":
        writer.write(record(3, kind="eval"))
    else:
        writer.write(record(3, **{"loss/new": 1.0}))

    assert [event.step for event in scalar_events(run)] == [1, 2, 3][: 2 + (call in ("evaluate", "new tag"))]
    writer.close("finished")


def test_a_slow_run_is_flushed_by_time(run: RunInfo) -> None:
    writer = TensorBoard(flush_every=1000, flush_s=0.0).open(run)
    for step in (1, 2, 3):
        writer.write(record(step))

    assert [event.step for event in scalar_events(run)] == [1, 2, 3]
    writer.close("finished")


KILLED = """
import sys, time
from pathlib import Path
from safeloop.sinks.jsonl import JsonLines
from safeloop.sinks.record import Record, RunInfo
from safeloop.sinks.tensorboard import TensorBoard

run = RunInfo("r", Path(sys.argv[1]), None, "", "", ("main",), ())
writers = [TensorBoard(flush_every=10, flush_s=1e9).open(run), JsonLines().open(run)]
for step in range(1, 38):
    for writer in writers:
        writer.write(Record(step, "train", {"loss/train": float(step)}, 0, 1.0))
print("written", flush=True)
time.sleep(60)
"""


def test_a_kill_loses_at_most_the_records_that_wait(run: RunInfo) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED, run.dir], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL

    assert [event.step for event in scalar_events(run)] == list(range(1, 32))
    assert len((run.dir / "metrics.jsonl").read_text().splitlines()) == 37


def test_only_the_owner_can_read_the_files(run: RunInfo) -> None:
    TensorBoard().open(run).close("finished")

    assert stat.S_IMODE(run.dir.stat().st_mode) == 0o700
    assert stat.S_IMODE(event_file(run).stat().st_mode) == 0o600


def test_two_writers_in_one_folder_have_files_of_their_own(run: RunInfo) -> None:
    for writer in [TensorBoard().open(run), TensorBoard().open(run)]:
        writer.close("finished")

    assert len(list(run.dir.iterdir())) == 2


def test_the_dashboard_text_serves_this_machine_only_and_opens_the_dashboard(
    run: RunInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spaced = tmp_path.parent / "my runs; x" / "digits"

    command, address = dashboard_text(run.dir).splitlines()

    assert command == "tensorboard --logdir runs --host 127.0.0.1 --port 6006"
    assert address == "http://127.0.0.1:6006/#custom_scalars"
    assert dashboard_text(Path("runs/digits")) == dashboard_text(run.dir)
    assert f"--logdir '{spaced.parent}' --host 127.0.0.1" in dashboard_text(spaced)


def test_a_tensorboard_that_is_not_on_the_path_is_shown_where_it_lies(
    run: RunInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "tensorboard").touch()
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    assert dashboard_text(run.dir).startswith(".venv/bin/tensorboard --logdir runs ")


def test_neither_torch_nor_tensorboard_nor_rich_is_imported_before_a_run_opens() -> None:
    code = """
    import sys
    from safeloop.sinks import fanout, union
    heavy = {"torch", "tensorboard", "rich", "numpy"} & set(sys.modules)
    assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)
