"""Lines for logs, and which of the two consoles a stream gets."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from safeloop.faults import Fault
from safeloop.sinks.console import Console
from safeloop.sinks.console_plain import PlainConsole
from safeloop.sinks.record import Record, RunInfo

ERROR = Fault("SL501", "non-finite gradient", "2 of 161 gradients", fix="add eps")
TRAIN = {"loss/train": 0.0831, "grad/main/pre_clip": 2.31, "grad/main/post_clip": 1.0, "optim/lr/main": 3e-4}


def train(step: int, **extra: float) -> Record:
    return Record(step, "train", TRAIN | {"perf/samples_per_s": 9120.0} | extra, 1, 0.0)


def evaluation(step: int) -> Record:
    return Record(step, "eval", {"loss/eval": 0.0912, "metric/accuracy": 0.975}, 1, 0.0)


def console(run: RunInfo, *, every_s: float = 0.0, quiet: bool = False) -> tuple[PlainConsole, io.StringIO]:
    stream = io.StringIO()
    return PlainConsole(run, stream, every_s=every_s, quiet=quiet), stream


def test_a_line_says_where_the_run_is_and_how_it_does(run: RunInfo) -> None:
    writer, stream = console(run)
    writer.write(train(50))
    writer.write(evaluation(200))

    first, second = stream.getvalue().splitlines()

    clock = r"\d\d:\d\d:\d\d  digits  "
    losses, rest = "loss 0.08310", "grad 2.310 -> 1.000  lr 3.00e-04  9,120 samples/s"
    assert re.fullmatch(f"{clock}step 50/2000  {losses}  {rest}", first)
    assert re.fullmatch(f"{clock}step 200/2000  eval loss 0.09120  accuracy 0.9750", second)


def test_several_optimizers_are_told_apart(run: RunInfo) -> None:
    writer, stream = console(replace(run, owners=("critic", "generator"), max_steps=None))
    writer.write(Record(5, "train", {"grad/critic/pre_clip": 2.0, "optim/lr/generator": 0.1}, 0, 0.0))

    assert stream.getvalue().split("  ", 2)[2] == "step 5  critic grad 2.000  generator lr 1.00e-01\n"


def test_lines_come_every_few_seconds_for_training_and_evaluation_apart(
    run: RunInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    writer, stream = console(run, every_s=5.0)
    for now in (100.0, 101.0, 104.9, 105.0, 106.0):
        writer.write(train(int(10 * now)))
        writer.write(evaluation(int(10 * now)))

    steps = re.findall(r"step (\d+)/", stream.getvalue())

    assert steps == ["1000", "1000", "1050", "1050"]


def test_an_error_that_ends_the_run_is_left_to_the_exception(run: RunInfo) -> None:
    writer, stream = console(run)
    writer.fault(ERROR, 3, 1)
    writer.close("failed")

    assert "add eps" not in stream.getvalue()
    assert "digits failed" in stream.getvalue()
    assert "faults  SL501 non-finite gradient" in stream.getvalue()


@pytest.mark.parametrize("quiet", [False, True])
def test_an_error_that_was_skipped_is_printed_in_full_once(run: RunInfo, quiet: bool) -> None:
    writer, stream = console(run, quiet=quiet)
    writer.fault(ERROR, 3, 1)
    writer.write(train(50))
    writer.fault(ERROR, 60, 2)
    writer.write(train(100))
    writer.close("finished")

    assert stream.getvalue().count(str(ERROR)) == 1
    assert ("non-finite gradient x2" in stream.getvalue()) != quiet


def test_a_warning_is_printed_before_anything_else_happens(run: RunInfo) -> None:
    writer, stream = console(run)
    warning = replace(ERROR, severity="warning")
    writer.fault(warning, 0, 1)

    assert stream.getvalue() == f"{warning}\n"


def test_the_result_block_ends_with_what_to_do_next(run: RunInfo) -> None:
    writer, stream = console(run, every_s=1e9)
    writer.write(train(2000, **{"loss/ce": 0.05}))
    writer.write(evaluation(2000))
    run.dir.mkdir(parents=True)
    (run.dir / "events.out.tfevents.1").touch()
    writer.close("finished")

    block = stream.getvalue().splitlines()[2:]

    assert re.fullmatch(r"digits finished: 2,000 steps in 0:0\d   9,120 samples/s", block[0])
    assert block[1:7] == [
        "  loss       0.08310",
        "  eval loss  0.09120",
        "  accuracy   0.9750",
        "  ce         0.05000",
        "  grad       2.310 -> 1.000",
        "  faults     none",
    ]
    assert block[7] == f"  run        {run.dir}"
    assert block[8].startswith("  dashboard  tensorboard --logdir ")
    assert block[9].endswith("/#custom_scalars")


def test_quiet_prints_nothing_but_faults(run: RunInfo) -> None:
    writer, stream = console(run, quiet=True)
    writer.write(train(50))
    writer.close("finished")

    assert stream.getvalue() == ""


def test_a_console_that_is_dropped_says_nothing_about_the_run(run: RunInfo) -> None:
    writer, stream = console(run)
    writer.close("dropped")

    assert stream.getvalue() == ""


def test_a_stream_that_knows_only_ascii_gets_escapes_and_control_characters_are_never_passed_on(run: RunInfo) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    writer = PlainConsole(replace(run, name="é\x1b[2J"), stream, every_s=0, quiet=False)
    writer.write(Record(1, "train", {"metric/µ\r": 1.0}, 0, 0.0))
    writer.close("finished")

    assert b"\x1b" not in raw.getvalue()
    assert b"\r" not in raw.getvalue()
    assert b"\\xe9\\x1b[2J" in raw.getvalue()


PROGRAM = """
import sys
from pathlib import Path
from safeloop.sinks.console import Console
from safeloop.sinks.record import Record, RunInfo
writer = Console().open(RunInfo("digits", Path(sys.argv[1]), 100, "", "", ("main",), ()))
for step in range(1, 101):
    writer.write(Record(step, "train", {"loss/train": 1 / step}, 0, 0.0))
    if step == 50:
        print("printed by the user")
writer.close("finished")
"""


def on_terminal(folder: Path, **environment: str) -> str:
    """What the program writes to a real pseudo-terminal."""
    parent, child = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")} | {"TERM": "xterm-256color"}
    with subprocess.Popen([sys.executable, "-c", PROGRAM, folder], stdout=child, env=env | environment) as process:
        os.close(child)
        output = b""
        while True:
            try:
                data = os.read(parent, 65536)
            except OSError:
                break
            if not data:
                break
            output += data
    os.close(parent)
    assert process.returncode == 0
    return output.decode()


def test_a_terminal_gets_the_live_display(tmp_path: Path) -> None:
    output = on_terminal(tmp_path, PYTHONIOENCODING="utf-8")

    assert "━" in output
    assert "\x1b[1A" in output
    assert "\x1b[36m" in output
    assert "printed by the user" in output
    assert output.rstrip().endswith(str(tmp_path) + "\x1b[0m")


def test_no_color_takes_the_colours_away_and_leaves_the_display(tmp_path: Path) -> None:
    output = on_terminal(tmp_path, NO_COLOR="1")

    assert "\x1b[1A" in output
    assert not re.search(r"\x1b\[[0-9;]*(3[0-7]|9[0-7]|38;)", output)


def test_a_dumb_terminal_gets_plain_lines(tmp_path: Path) -> None:
    output = on_terminal(tmp_path, TERM="dumb")

    assert "\x1b" not in output
    assert re.match(r"\d\d:\d\d:\d\d  digits  step 1/100", output)


@pytest.mark.parametrize("forced", [{}, {"FORCE_COLOR": "1"}], ids=["plain environment", "FORCE_COLOR"])
def test_a_pipe_gets_whole_lines_without_a_single_control_character(tmp_path: Path, forced: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path], capture_output=True, check=True, env=os.environ | forced, timeout=60
    )

    assert not done.stderr
    assert re.search(rb"[\x00-\x09\x0b-\x1f\x7f]", done.stdout) is None
    assert re.match(rb"\d\d:\d\d:\d\d  digits  step 1/100  loss 1.000\n", done.stdout)
    assert b"digits finished: 100 steps" in done.stdout


def test_a_quiet_console_stays_plain_on_a_terminal(run: RunInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)

    assert isinstance(Console(quiet=True).open(run), PlainConsole)
