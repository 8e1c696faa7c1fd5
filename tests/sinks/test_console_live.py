"""The live display, drawn on a terminal made of a string."""

from __future__ import annotations

import io
import re
import sys
import time
from dataclasses import replace

import pytest
from rich.console import Console

from safeloop.faults import Fault
from safeloop.sinks.console_live import LiveConsole
from safeloop.sinks.record import Record, RunInfo

ERROR = Fault("SL501", "non-finite gradient", "2 of 161 gradients", fix="add eps")
TRAIN = {
    "loss/train": 0.0831,
    "metric/accuracy": 0.975,
    "grad/main/pre_clip": 2.31,
    "grad/main/post_clip": 1.0,
    "optim/lr/main": 3e-4,
    "perf/samples_per_s": 9120.0,
}


def live(run: RunInfo, *, width: int = 100) -> tuple[LiveConsole, io.StringIO]:
    stream = io.StringIO()
    console = Console(force_terminal=True, file=stream, width=width, highlight=False, color_system=None)
    return LiveConsole(run, console), stream


def frame(stream: io.StringIO) -> list[str]:
    """The last frame as lines."""
    last = re.split(r"\r?(?:\x1b\[2K(?:\x1b\[1A)?)+", stream.getvalue())[-1]
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", last).splitlines()]


def test_a_frame_shows_bar_step_losses_norms_rate_and_speed(run: RunInfo) -> None:
    writer, stream = live(run)
    writer.write(Record(1250, "train", TRAIN, 8, 0.0))
    writer.flush()

    bar, place, losses, main = frame(stream)

    assert re.fullmatch(r"digits  ━{20} +62%", bar)
    assert place == "  step 1,250/2,000   epoch 8   9,120 samples/s"
    assert losses == "  loss 0.08310   accuracy 0.9750"
    assert main == "  main   gradient norm 2.310 → 1.000   lr 3.00e-04"
    writer.close("finished")


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_frame_never_wraps(run: RunInfo, width: int) -> None:
    writer, stream = live(replace(run, owners=("critic", "generator")), width=width)
    many = {f"loss/term{i}": 0.1 * i for i in range(20)}
    norms = {f"grad/{owner}/pre_clip": 2.0 for owner in ("critic", "generator")}
    writer.write(Record(1250, "train", TRAIN | many | norms, 8, 0.0))
    writer.flush()

    lines = frame(stream)

    assert len(lines) == 5
    assert all(len(line) <= width for line in lines)
    writer.close("finished")


def test_a_run_of_unknown_length_shows_its_step_without_a_bar(run: RunInfo) -> None:
    writer, stream = live(replace(run, max_steps=None))
    writer.progress(7, {})
    writer.flush()

    assert frame(stream) == ["digits", "  step 7   epoch 0"]
    writer.close("finished")


def test_what_is_not_known_yet_takes_no_line(run: RunInfo) -> None:
    writer, stream = live(run)

    assert len(frame(stream)) == 2
    writer.close("finished")


def test_the_result_replaces_the_display(run: RunInfo) -> None:
    writer, stream = live(run)
    writer.write(Record(2000, "train", TRAIN, 8, 0.0))
    writer.flush()
    writer.close("finished")

    block = frame(stream)

    assert re.fullmatch(r"digits finished  2,000 steps in 0:0\d   9,120 samples/s", block[0])
    assert block[1:4] == ["  loss      0.08310", "  accuracy  0.9750", "  grad      2.310 → 1.000"]
    assert stream.getvalue().count("\x1b[?25l") == stream.getvalue().count("\x1b[?25h") == 1


def test_an_error_is_printed_when_the_run_went_on_and_not_when_it_ended_it(run: RunInfo) -> None:
    skipping, skipped = live(run)
    skipping.fault(ERROR, 3, 1)
    skipping.close("finished")
    failing, failed = live(run)
    failing.fault(ERROR, 3, 1)
    failing.close("failed")

    assert skipped.getvalue().count("add eps") == 1
    assert "add eps" not in failed.getvalue()
    assert "SL501 non-finite gradient" in failed.getvalue()


def test_text_to_be_copied_is_left_to_the_terminal_to_wrap(run: RunInfo) -> None:
    writer, stream = live(run, width=30)
    command = "run safeloop train configs/digits.yaml data.batch_size=64 data.drop_last=true"
    writer.fault(replace(ERROR, fix=command, severity="warning"), 1, 1)
    writer.close("finished")

    assert command in stream.getvalue()
    assert str(run.dir) in stream.getvalue()


def test_markup_and_control_characters_in_names_are_shown_and_not_obeyed(run: RunInfo) -> None:
    writer, stream = live(replace(run, name="a[red]b\x1b]0;title\x07"))
    writer.write(Record(1, "train", {"metric/[bold]m\x1b[2J": 1.0}, 0, 0.0))
    writer.flush()
    writer.close("finished")

    assert "a[red]b\\x1b]0;title\\x07" in stream.getvalue()
    assert "[bold]m\\x1b[2J 1.000" in stream.getvalue()
    assert "\x1b[2J" not in stream.getvalue()


def test_drawing_takes_about_a_hundredth_of_the_time(run: RunInfo) -> None:
    writer, stream = live(run)
    before = len(stream.getvalue())
    begin = time.perf_counter()
    for step in range(20_000):
        writer.progress(step, {})
    took = time.perf_counter() - begin

    frames = stream.getvalue()[before:].count("step ")
    assert frames <= took / 0.1 + 1
    writer.close("finished")


def test_the_streams_are_the_users_own_again_after_the_run(run: RunInfo) -> None:
    streams = sys.stdout, sys.stderr
    writer, _ = live(run)
    writer.close("failed")

    assert (sys.stdout, sys.stderr) == streams


def test_a_terminal_without_unicode_gets_ascii_signs(run: RunInfo) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    writer = LiveConsole(run, Console(force_terminal=True, file=stream, width=100, highlight=False))
    writer.write(Record(1250, "train", TRAIN, 8, 0.0))
    writer.flush()
    writer.fault(ERROR, 2, 17)
    writer.close("finished")
    stream.flush()

    assert b"2.310 -> 1.000" in raw.getvalue()
    assert b"non-finite gradient x17" in raw.getvalue()
