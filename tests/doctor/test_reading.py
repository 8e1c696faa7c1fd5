"""Whatever lies in the folder: a diagnosis or SL865, never another exception."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safeloop.doctor import diagnose, read_run
from safeloop.faults import FaultError, exit_code


def write(folder, text, config=b""):
    (folder / "metrics.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    (folder / "config.yaml").write_bytes(config)
    return folder


def record(**more):
    return json.dumps({"kind": "train", "step": 1, "epoch": 0, "wall_time": 1.0} | more)


def refused(path):
    with pytest.raises(FaultError) as raised:
        read_run(path)
    assert (raised.value.fault.code, raised.value.exit_code) == ("SL865", 6)
    return raised.value.fault.what


def test_the_code_ends_a_command_with_6():
    assert exit_code("SL865") == 6


def test_a_folder_without_a_log_is_refused(tmp_path):
    assert "there is nothing of that name" in refused(tmp_path / "none")
    assert "it has no metrics.jsonl" in refused(tmp_path)
    (tmp_path / "metrics.jsonl").mkdir()
    assert "it has no metrics.jsonl" in refused(tmp_path)
    refused("a\0b")


@pytest.mark.parametrize("text", ["", "\n \n", "garbage", "{}", "[]\n1\nnull", '{"kind": "train"}', b"\x00\xff" * 99])
def test_a_log_without_a_record_is_refused(text, tmp_path):
    what = refused(write(tmp_path, text))
    assert "is empty" in what or "has no record in" in what


def test_numbers_that_json_has_no_word_for_are_read(tmp_path):
    text = record(**{"loss/a": "NaN", "loss/b": "-Infinity", "loss/c": 10**400, "loss/d": True, "loss/e": "x"})
    run = read_run(write(tmp_path, text))
    assert math.isnan(run.get("loss/a").values[0])
    assert run.get("loss/b").values == (-math.inf,)
    assert run.get("loss/c").values == (math.inf,)
    assert set(run.series) == {"loss/a", "loss/b", "loss/c"}


def test_of_a_step_written_twice_the_later_line_counts_and_steps_are_sorted(tmp_path):
    lines = [record(step=step, **{"loss/train": float(value)}) for step, value in [(2, 1), (1, 2), (2, 3)]]
    run = read_run(write(tmp_path, "\n".join(lines)))
    assert (run.get("loss/train").steps, run.get("loss/train").values) == ((1, 2), (2.0, 3.0))


def test_the_log_itself_may_be_named(tmp_path):
    write(tmp_path, record(**{"loss/train": 1.0}))
    assert len(read_run(tmp_path / "metrics.jsonl").get("loss/train")) == 1


@pytest.mark.parametrize("step", [-1, 1.5, "3", None, True, 2**64, [1]])
def test_a_step_that_is_no_step_is_a_damaged_line(step, tmp_path):
    run = read_run(write(tmp_path, record(step=step) + "\n" + record(**{"loss/train": 1.0})))
    assert run.num_bad_lines == 1


TAGS = st.sampled_from(
    [
        *(
            "loss/train",
            "loss/a",
            "loss/eval",
            "loss/",
            "metric/accuracy",
            "optim/lr/m",
            "optim/lr/m/0",
            "x/loss_scale",
        ),
        *("grad/m/pre_clip", "grad/m/post_clip", "grad/m/clip_fraction", "grad/m/max_since_last", "grad/m", "grad/"),
        *("loss_grad/a", "loss_grad/b", "loss_cos/a~b", "loss_cos/a", "module/grad_norm/x", "module/grad_norm/y"),
        *("perf/samples_per_s", "perf/step_ms", "safety/skipped_total", "safety/inactive/a", "\ud800", "\x1b[2J"),
    ]
)
NUMBERS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0, 0.0, 1.0, 1e308, -1e308, 5e-324, 10**30, "NaN", "Infinity", "-Infinity", None, "x", [], {}]),
)
RECORDS = st.fixed_dictionaries(
    {"kind": st.sampled_from(["train", "eval", "fault", "other", 3]), "step": st.integers(-1, 60), "count": NUMBERS}
)
CONFIGS = st.one_of(
    st.sampled_from(
        [b"", b"- 1", b"optimizers: 3", b"optimizers: {m: [1]}", b"run: {precision: fp16}", b"a: 2001-99-99"]
    ),
    st.binary(max_size=40),
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(RECORDS, st.dictionaries(TAGS, NUMBERS, max_size=20)), max_size=40),
    st.binary(max_size=60),
    st.integers(0, 4000),
    CONFIGS,
)
def test_a_random_log_cut_anywhere_is_diagnosed_or_refused(tmp_path, records, garbage, cut, config):
    text = "\n".join(json.dumps(head | tags) for head, tags in records).encode()
    write(tmp_path, text[: max(0, len(text) - cut)] + garbage, config)
    try:
        diagnosis = diagnose(read_run(tmp_path))
    except FaultError as error:
        assert error.fault.code == "SL865"
    else:
        json.dumps(diagnosis.as_json(), allow_nan=False)
        assert str(diagnosis)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_long_series_of_any_numbers_are_diagnosed(tmp_path, data):
    tags = data.draw(st.lists(TAGS, min_size=1, max_size=8, unique=True))
    values = st.sampled_from(data.draw(st.lists(NUMBERS, min_size=1, max_size=4)))
    lines = [record(step=step, **{tag: data.draw(values) for tag in tags}) for step in range(24)]
    assert str(diagnose(read_run(write(tmp_path, "\n".join(lines)))))
