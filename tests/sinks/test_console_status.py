"""Numbers and durations in words, and what is said of faults."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from safeloop.faults import Fault
from safeloop.sinks.console_status import Status, duration, losses, number, optimizers, speed
from safeloop.sinks.record import RunInfo

WARNING = Fault("SL854", "data ended early", "12 of 20 batches", severity="warning")
ERROR = Fault("SL501", "non-finite gradient", "2 of 161 gradients")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.0831, "0.08310"),
        (-2.3026, "-2.303"),
        (0.975, "0.9750"),
        (1.0, "1.000"),
        (123.456, "123.5"),
        (999.96, "1,000"),
        (1234.6, "1,235"),
        (1234567.0, "1.23e+06"),
        (3.1e-5, "3.10e-05"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_a_number_has_four_significant_digits(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0:00"),
        (7, "0:07"),
        (72, "1:12"),
        (750, "12:30"),
        (3599.9, "1:00:00"),
        (11100, "3:05:00"),
        (40000, "11:06:40"),
    ],
)
def test_a_duration_leaves_out_what_is_zero(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_losses_come_in_the_order_loss_evaluation_metrics_terms() -> None:
    scalars = {"loss/ce": 1.0, "perf/step_ms": 9.0, "metric/accuracy": 0.5, "loss/eval": 2.0, "loss/train": 3.0}

    assert list(losses(scalars)) == [("loss", "3.000"), ("eval loss", "2.000"), ("accuracy", "0.5000"), ("ce", "1.000")]


def test_the_one_term_that_is_the_loss_is_not_shown_twice() -> None:
    assert list(losses({"loss/train": 0.5, "loss/ce": 0.5})) == [("loss", "0.5000")]
    assert [label for label, _ in losses({"loss/train": 1.0, "loss/ce": 0.5})] == ["loss", "ce"]


def test_a_norm_is_shown_once_where_clipping_changed_nothing() -> None:
    scalars = {f"grad/{owner}/pre_clip": 2.0 for owner in "ab"} | {"grad/a/post_clip": 1.0, "grad/b/post_clip": 2.0}

    rows = list(optimizers(scalars | {"optim/lr/a": 3e-4}, ("a", "b", "c"), "->"))

    assert rows == [("a", "2.000 -> 1.000", "3.00e-04"), ("b", "2.000", ""), ("c", "", "")]


def test_the_total_norm_stands_in_for_a_single_optimizer_only() -> None:
    total = {"grad/total/pre_clip": 2.0, "grad/total/post_clip": 1.0}

    assert list(optimizers(total, ("main",), "->")) == [("main", "2.000 -> 1.000", "")]
    assert [row[1] for row in optimizers(total, ("a", "b"), "->")] == ["", ""]


@pytest.mark.parametrize("rate", [math.nan, math.inf])
def test_an_unknown_speed_is_not_shown(rate: float) -> None:
    assert speed({"perf/samples_per_s": rate}) == speed({}) == ""
    assert speed({"perf/samples_per_s": 9120.4}) == "9,120 samples/s"


def test_a_warning_is_news_at_once_and_an_error_when_the_run_goes_on(run: RunInfo) -> None:
    status = Status(run)
    status.take_fault(WARNING, 1, 1)
    status.take_fault(ERROR, 2, 1)

    assert list(status.news(with_errors=False)) == [(WARNING, str(WARNING))]
    assert list(status.news(with_errors=False)) == []
    assert list(status.news(with_errors=True)) == [(ERROR, str(ERROR))]
    assert list(status.news(with_errors=True)) == []


def test_a_fault_that_comes_again_is_counted_and_not_said_again(run: RunInfo) -> None:
    status = Status(run)
    for count in (1, 2, 17):
        status.take_fault(WARNING, count, count)
    status.take_fault(ERROR, 20, 1)
    status.take_fault(replace(ERROR, what="3 of 161 gradients"), 21, 1)

    assert len(list(status.news(with_errors=True))) == 3
    assert status.tally() == "SL854 data ended early x17, SL501 non-finite gradient x2"


def test_after_three_faults_of_a_code_the_next_are_one_line(run: RunInfo) -> None:
    status = Status(run)
    for step in range(5):
        status.take_fault(replace(ERROR, what=f"{step} gradients"), step, 1)

    said = [text for _, text in status.news(with_errors=True)]

    assert [text.count("\n") > 0 for text in said] == [True, True, True, False, False]
    assert said[4] == "SL501 non-finite gradient at step 4: 4 gradients"


def test_the_time_left_comes_from_the_pace_so_far(run: RunInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    status = Status(run)
    status.reach(500, {})
    assert status.left() == ""
    now = 110.0
    status.reach(1000, {})
    assert status.left() == "0:20 left"
    assert status.fraction == 0.5
    status.reach(2000, {})
    assert status.left() == ""


def test_a_run_of_unknown_length_has_no_fraction_and_no_end(run: RunInfo) -> None:
    status = Status(replace(run, max_steps=None))
    status.reach(1, {})
    status.reach(2, {})

    assert status.fraction is None
    assert status.left() == ""
