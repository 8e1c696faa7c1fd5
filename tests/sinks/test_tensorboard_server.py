"""A real TensorBoard over what we wrote: the endpoints that its pages ask."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from safeloop.faults import Fault
from safeloop.sinks.record import Record, RunInfo
from safeloop.sinks.tensorboard import TensorBoard, TensorBoardWriter

DEADLINE_S = 60.0

Get = Callable[..., Any]


def scalars(step: int) -> dict[str, float]:
    modules = {f"module/grad_norm/{name}": step / 100 for name in ("encoder.0", "encoder.2", "head")}
    clip = {"grad/main/pre_clip": 2.0, "grad/main/post_clip": 1.0}
    return {"loss/train": 1 / step, "optim/lr/main": 1e-3, **clip, **modules}


@pytest.fixture
def writer(run: RunInfo) -> Iterator[TensorBoardWriter]:
    writer = TensorBoard().open(run)
    for step in (50, 100, 150):
        writer.write(Record(step, "train", scalars(step), 0, time.time()))
    writer.flush()
    yield writer
    writer.close("finished")


@pytest.fixture
def get(run: RunInfo, writer: TensorBoardWriter, tmp_path: Path) -> Iterator[Get]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--load_fast", "false", "--logdir", str(run.dir.parent)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--reload_interval", "1"]
    log = tmp_path / "server.log"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(path: str, /, **query: str) -> Any:
        with opener.open(f"http://127.0.0.1:{port}{path}?{urlencode(query)}", timeout=10) as answer:
            return json.load(answer)

    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as server:
        try:
            until(lambda: server.poll() is not None or run.name in quietly(get, "/data/runs"))
            assert server.poll() is None, log.read_text()
            yield get
        finally:
            server.terminate()


def quietly(get: Get, path: str) -> Any:
    try:
        return get(path)
    except OSError:
        return []


def until(is_met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not is_met():
        assert time.monotonic() < deadline, "TensorBoard did not answer in time"
        time.sleep(0.1)


def charts(get: Get) -> dict[str, dict[str, Any]]:
    layout = get("/data/plugin/custom_scalars/layout")
    return {chart["title"]: chart for category in layout.get("category", []) for chart in category["chart"]}


def test_a_real_server_shows_the_run_its_dashboard_and_its_values_and_follows_it_live(
    run: RunInfo, writer: TensorBoardWriter, get: Get
) -> None:
    assert get("/data/runs") == [run.name]
    until(lambda: get("/data/plugins_listing")["custom_scalars"]["enabled"])
    enabled = {name for name, plugin in get("/data/plugins_listing").items() if plugin["enabled"]}
    assert {"scalars", "custom_scalars", "text", "hparams"} <= enabled

    shown = charts(get)
    assert shown["loss: train and eval"]["multiline"]["tag"] == ["^loss/train$"]
    assert len(shown["gradient norm before and after clipping: main"]["multiline"]["tag"]) == 2
    assert {"encoder.0", "encoder.2", "head"} < shown.keys()
    assert shown["all modules: median between smallest and largest"]["margin"]["series"][0]["lower"].endswith("/min")

    points = get("/data/plugin/scalars/scalars", run=run.name, tag="grad/main/pre_clip")
    assert [(step, value) for _, step, value in points] == [(50, 2.0), (100, 2.0), (150, 2.0)]
    pattern = shown["encoder.2"]["multiline"]["tag"][0]
    matched = get("/data/plugin/custom_scalars/scalars", run=run.name, tag=pattern)
    assert list(matched["tag_to_events"]) == ["module/grad_norm/encoder.2"]
    assert get("/data/plugin/text/tags") == {run.name: ["plan", "config"]}
    assert "1 zero       main" in get("/data/plugin/text/text", run=run.name, tag="plan")[0]["text"]

    writer.fault(Fault("SL501", "non-finite gradient", "one"), 160, 1)
    writer.write(Record(200, "eval", {"loss/eval": 0.25, "metric/accuracy": 0.5}, 0, time.time()))
    until(lambda: "metric: accuracy" in charts(get))
    assert len(charts(get)["loss: train and eval"]["multiline"]["tag"]) == 2
    assert get("/data/plugin/scalars/scalars", run=run.name, tag="metric/accuracy")[0][1:] == [200, 0.5]
    assert "SL501" in get("/data/plugin/text/text", run=run.name, tag="faults")[0]["text"]
