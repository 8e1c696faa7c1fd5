"""Each rule: a run in which only that is wrong, and the ones beside it in which it is not."""

from __future__ import annotations

import json
import math

import pytest

from safeloop.doctor import diagnose, read_run


def found_in(path):
    return [(finding.level, finding.title) for finding in diagnose(read_run(path)).findings]


def after(first, then, step=200):
    """`first` up to that step, `then` from there on."""
    return lambda s: first if s < step else then


def test_a_healthy_run_is_told_with_the_numbers_that_were_looked_at(run_of):
    diagnosis = diagnose(read_run(run_of()))
    assert diagnosis.findings == ()
    assert (diagnosis.is_healthy, diagnosis.is_serious) == (True, False)
    text = str(diagnosis)
    assert text.splitlines()[0].endswith(": nothing looks wrong")
    assert "records  40, steps 10 to 400" in text
    assert "loss/train  1.9" in text
    assert "(step 10) to 0.1" in text
    assert "module/grad_norm  3 modules" in text


NAN, INF = math.nan, math.inf
SERIOUS = {
    "loss NaN": ({"loss/train": after(1.0, NAN)}, "the loss is not finite"),
    "term inf": ({"loss/train": after(1.0, INF), "loss/b": after(1.0, INF)}, "the loss is not finite"),
    "diverges": ({"loss/train": lambda s: 0.01 * s}, "the loss diverges"),
    "negative and exploding": ({"loss/train": lambda s: -(1.03**s)}, "the loss diverges"),
    "back up": ({"loss/train": lambda s: 2 - s / 110 if s < 200 else (s - 190) / 100}, "the loss rose again"),
    "flat": ({"loss/train": 2.3}, "the loss does not fall"),
    "exploded": ({"loss/train": lambda s: 2.3 if s != 90 else 1e5}, "the loss exploded on the way"),
    "rate runs out": ({"optim/lr/main": after(0.1, 0.0)}, "the learning rate of `main` is zero"),
    "no rate": ({"optim/lr/main": 0.0}, "the learning rate of `main` is zero"),
    "skipped": ({"safety/skipped_total": lambda s: s / 4}, "updates were skipped"),
    "dead module": ({"module/grad_norm/body": 0.0}, "modules without a gradient"),
    "died": ({"module/grad_norm/mid": after(1.0, 0.0, 150)}, "modules without a gradient"),
    "gradient zero": ({"grad/main/pre_clip": after(1.0, 0.0, 300)}, "gradients of `main` are zero"),
    "gradient grows": ({"grad/main/pre_clip": lambda s: 1.05**s}, "gradients of `main` grow"),
    "clipped to nothing": (
        {"grad/main/clip_fraction": 1.0, "grad/main/post_clip": 1e-4},
        "clipping of `main` cuts every step",
    ),
    "scale": ({"amp/loss_scale": lambda s: 65536.0 * 0.5 ** (s // 10)}, "the gradient scale collapses"),
}


@pytest.mark.parametrize("case", SERIOUS)
def test_what_is_serious_comes_first(case, run_of):
    tags, title = SERIOUS[case]
    assert found_in(run_of(**tags))[0] == ("serious", title)


WARNINGS = {
    "a gap of NaN": ({"loss/train": lambda s: NAN if s in (100, 110) else healthy_loss(s)}, "the loss is not finite"),
    "a few skips": ({"safety/skipped_total": after(0.0, 2.0)}, "updates were skipped"),
    "gradient grows": ({"grad/main/pre_clip": lambda s: 1.02**s}, "gradients of `main` grow"),
    "gradient vanishes": (
        {"grad/main/pre_clip": lambda s: 0.95**s, "grad/main/post_clip": lambda s: 0.95**s},
        "gradients of `main` vanish",
    ),
    "clipped a lot": (
        {"grad/main/clip_fraction": 1.0, "grad/main/post_clip": 0.03},
        "clipping of `main` cuts every step",
    ),
    "spike": (
        {"grad/main/clip_fraction": None, "grad/main/max_since_last": lambda s: 1e4 if s == 300 else 1.0},
        "gradients of `main` spike",
    ),
    "far below": ({"module/grad_norm/body": 1e-9}, "modules far below the others"),
    "negligible": ({"loss_grad/b": 1e-5}, "loss term `b` moves nothing"),
    "nothing": ({"loss_grad/b": 0.0}, "loss term `b` moves nothing"),
    "exact": ({"loss_grad_exact/a": 1.0, "loss_grad_exact/b": 1e-6}, "loss term `b` moves nothing"),
    "conflict": ({"loss_cos/a~b": -0.9}, "loss terms pull against each other: `a` and `b`"),
    "inactive": ({"safety/inactive/b": 1.0}, "loss term `b` is never active"),
    "slower": ({"perf/samples_per_s": lambda s: 5000 / (1 + s / 100)}, "the run gets slower"),
}


def healthy_loss(step):
    return 2.0 * math.exp(-step / 120) + 0.1


@pytest.mark.parametrize("case", WARNINGS)
def test_what_is_suspicious_is_a_warning(case, run_of):
    tags, title = WARNINGS[case]
    assert found_in(run_of(**tags)) == [("warning", title)]


RIGHT = {
    "a schedule that ends at zero": {"optim/lr/main": lambda s: 0.1 if s < 400 else 0.0},
    "a warm-up from zero": {"optim/lr/main": lambda s: min(0.1, (s - 10) / 1000)},
    "noise at the floor": {"loss/train": lambda s: 2 * math.exp(-s / 20) + 0.2 + 0.1 * math.sin(s)},
    "a slow fall": {"loss/train": lambda s: 3 - 0.001 * s + 0.002 * math.sin(s)},
    "a loss that crosses zero": {"loss/train": lambda s: math.cos(s / 40)},
    "gradients that vanish as the loss does": {
        "loss/train": lambda s: 0.95**s,
        "grad/main/pre_clip": lambda s: 0.95**s,
        "grad/main/post_clip": lambda s: 0.95**s,
    },
    "clipped a little on every step": {
        "grad/main/clip_fraction": 1.0,
        "grad/main/pre_clip": 3.0,
        "grad/main/post_clip": 1.0,
    },
    "a gate that opens later": {"module/grad_norm/body": after(0.0, 1.0, 60)},
    "a conflict now and then": {"loss_cos/a~b": lambda s: -0.9 if s % 30 == 0 else 0.1},
    "active now and then": {"safety/inactive/b": lambda s: 1.0 if s % 30 else 0.5},
    "small modules": {"module/grad_norm/body": 1e-3},
    "no clipping": {"grad/main/clip_fraction": None},
    "a neighbour on the machine": {"perf/samples_per_s": lambda s: 1000.0 if 200 < s < 350 else 5000.0},
    "steps too short to time": {"perf/samples_per_s": lambda s: 5000 / (1 + s / 100), "perf/step_ms": 0.1},
    "a slow start": {"perf/samples_per_s": lambda s: 100.0 if s == 10 else 5000.0},
    "a scale that settles": {"amp/loss_scale": lambda s: max(1024.0, 65536.0 * 0.5 ** (s // 10))},
}


@pytest.mark.parametrize("case", RIGHT)
def test_what_looks_alike_and_is_right_is_left_alone(case, run_of):
    assert found_in(run_of(**RIGHT[case])) == []


def test_two_optimizers_that_play_against_each_other_need_no_falling_loss(run_of):
    tags = {"loss/train": lambda s: 1.4 + 0.3 * math.sin(s), "grad/critic/pre_clip": 1.0, "grad/critic/post_clip": 1.0}
    assert found_in(run_of(**tags)) == []


@pytest.mark.parametrize(
    ("evals", "titles"),
    [
        (
            {"loss/eval": lambda s: 1 + abs(s - 120) / 200},
            ["`loss/eval` was best long ago", "evaluation falls behind training"],
        ),
        ({"metric/accuracy": lambda s: 0.9 - abs(s - 120) / 500}, ["`accuracy` was best long ago"]),
        ({"metric/accuracy": lambda s: 0.9 - math.exp(-s / 30) + 0.001 * math.sin(s)}, []),
        ({"metric/accuracy": lambda s: 0.3 + s / 300 if s <= 160 else 0.83 - s / 8000}, []),
        ({"metric/blob": lambda s: 0.9 - abs(s - 120) / 500}, []),
        ({"metric/redraw_mse": lambda s: 1 / s}, []),
    ],
)
def test_an_evaluation_that_was_best_long_ago(evals, titles, run_of):
    assert [title for _, title in found_in(run_of(evals=evals))] == titles


def fault_line(severity, count=1, code="SL501"):
    parts = {"code": code, "title": "t", "what": "w", "where": "x", "why": "y", "fix": "z", "severity": severity}
    return json.dumps({"kind": "fault", "step": 7, "count": count} | parts) + "\n"


def test_recorded_faults_are_told_once_with_their_count_errors_first(run_of):
    faults = fault_line("warning", code="SL115") + fault_line("error") + fault_line("error", 3)
    diagnosis = diagnose(read_run(run_of(faults=faults)))
    assert [(one.level, one.title) for one in diagnosis.findings] == [("serious", "SL501 t"), ("warning", "SL115 t")]
    assert diagnosis.findings[0].what == "w (step 7, 3 times); x"
    assert diagnosis.findings[0].config == "safeloop explain SL501"


def test_overflows_of_fp16_now_and_then_are_a_note(run_of):
    path = run_of(config="run: {precision: fp16}", **{"safety/skipped_total": 2.0})
    diagnosis = diagnose(read_run(path))
    assert [one.level for one in diagnosis.findings] == ["note"]
    assert diagnosis.is_healthy


def test_the_config_path_is_told_with_its_present_value(run_of):
    tags = {"grad/main/clip_fraction": 1.0, "grad/main/post_clip": 1e-4}
    (finding,) = diagnose(read_run(run_of(**tags))).findings
    assert finding.config == "optimizers.main.max_norm (now 1.0)"
    assert "steps 10 to 400" in finding.what
    (finding,) = diagnose(read_run(run_of(**{"optim/lr/main": after(0.1, 0.0)}))).findings
    assert finding.what == "optim/lr/main is 0 from step 200 to 400: 21 of 40 records"
    assert finding.config == "optimizers.main.scheduler (now type: StepLR, step_size: 30)"


def test_a_killed_run_is_judged_by_what_it_left(run_of):
    path = run_of(is_finished=False)
    text = (path / "metrics.jsonl").read_text()
    (path / "metrics.jsonl").write_text(text[: len(text) // 2])
    diagnosis = diagnose(read_run(path))
    assert [(one.level, one.title) for one in diagnosis.findings] == [("note", "the run has no final weights")]
    assert "1 damaged lines" in diagnosis.findings[0].what


def test_a_few_records_are_no_trend(run_of):
    path = run_of(**{"loss/train": 2.3})
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (path / "metrics.jsonl").write_text("".join(lines[:6]))
    assert found_in(path) == []
