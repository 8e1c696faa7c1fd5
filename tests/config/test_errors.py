from __future__ import annotations

import pickle

import pytest

from safeloop.config import ConfigError, load
from safeloop.config.errors import Problem, render
from safeloop.config.nodes import Origin
from safeloop.faults import Fault


def test_an_unknown_key_is_rendered_with_line_caret_and_the_nearest_key(refused):
    text = str(
        refused(
            "run: {max_steps: 1}\noptimizers:\n  main: {type: AdamW, lrr: 1e-3}\n", given=["model", "data", "trainer"]
        )
    )
    expected = """\
error[SL101]: unknown key 'lrr'
  --> config.yaml:3:23  (optimizers.main.lrr)
  |
3 |   main: {type: AdamW, lrr: 1e-3}
  |                       ^^^
  = help: did you mean 'lr'? accepted here: agc, amsgrad, betas, capturable, clip_value, eps, foreach, fused, groups,
          lr, max_norm, maximize, params, scheduler, type, weight_decay

1 error; nothing was run. More: safeloop explain CODE, for SL101"""
    assert text == expected


@pytest.mark.parametrize(
    ("text", "code", "place", "what", "fix"),
    [
        ("optimizers: {type: Adamw}", "SL105", "2:20 (optimizers.main.type)", "'Adamw'", "did you mean 'AdamW'"),
        ("optimizers: {lr: 1}", "SL103", "2:18 (optimizers.lr)", "expected a section", ""),
        ("optimizers: {a: {lr: 1}}", "SL102", "2:14 (optimizers.a.type)", "missing key 'type'", "lr"),
        ("optimizers: {type: [SGD]}", "SL105", "2:20 (optimizers.main.type)", "a list", "SGD"),
        ("optimizers: {type: 3}", "SL105", "2:20 (optimizers.main.type)", "unknown type 3", "SGD"),
        ("optimizers: {total: {type: SGD}}", "SL104", "2:14 (optimizers.total)", "stands for all", "name"),
        ("optimizers: 3", "SL103", "2:13 (optimizers)", "is 3, expected a section", ""),
        ("optimizers: {type: SGD, params: a}", "SL103", "2:33 (optimizers.main.params)", "a list or 'rest'", "['a']"),
        ("optimizers: {type: SGD, params: []}", "SL104", "2:33 (optimizers.main.params)", "1 or more values", ""),
        ("optimizers: {type: Adam, betas: [0.9]}", "SL103", "2:33 (optimizers.main.betas.1)", "2 values", ""),
        ("optimizers: {type: Adam, betas: [1, 1, 1]}", "SL104", "2:33 (optimizers.main.betas)", "2 values at most", ""),
        ("optimizers: {type: Adam, amsgrad: 1}", "SL103", "2:35 (optimizers.main.amsgrad)", "true or false", ""),
        (
            "optimizers: {type: SGD, groups: [{lr: 1}]}",
            "SL102",
            "2:34 (optimizers.main.groups.0.params)",
            "'params'",
            "lr",
        ),
        (
            "optimizers: {type: SGD, scheduler: {type: StepLR, step_size: 0}}",
            "SL104",
            "2:62 (optimizers.main.scheduler.step_size)",
            "1 or more",
            "",
        ),
        (
            "optimizers: {type: SGD, scheduler: {type: OneCycleLR, max_lr: 1, total_steps: 0}}",
            "SL104",
            "2:79 (optimizers.main.scheduler.total_steps)",
            "1 or more",
            "",
        ),
        ("optimizers: {type: SGD, lr: 1, fused: yes}", "SL103", "2:39 (optimizers.main.fused)", "'yes'", ""),
        (
            "optimizers: {type: SGD}\nlog: {sinks: [tensorbord]}",
            "SL105",
            "3:15 (log.sinks.0)",
            "'tensorbord'",
            "'tensorboard'",
        ),
        ("optimizers: {type: SGD}\nlog: {sinks: console}", "SL103", "3:14 (log.sinks)", "a list", "['console']"),
        ("optimizers: {type: SGD}\naudit: {accept: {SL99: [a]}}", "SL104", "3:18 (audit.accept.SL99)", "no code", ""),
        ("optimizers: {type: SGD}\nlosses: {train: {weight: 1}}", "SL104", "3:10 (losses.train)", "total", ""),
        (
            "optimizers: {type: SGD}\nlosses: {declared: {wait: 1}}",
            "SL101",
            "3:21 (losses.declared.wait)",
            "'wait'",
            "weight",
        ),
        ("optimizers: {type: SGD}\nlosses: {a: {type: MSE}}", "SL105", "3:20 (losses.a.type)", "'MSE'", "MSELoss"),
        ("optimizers: {type: SGD}\nlosses: {a: 2}", "SL103", "3:13 (losses.a)", "is 2", ""),
        (
            "optimizers: {type: SGD}\nlosses: {a: {type: MSELoss, reduction: none}}",
            "SL104",
            "3:40 (losses.a.reduction)",
            "'mean' or 'sum'",
            "",
        ),
        ("optimizers: {type: SGD}\nevaluate: {every: 0}", "SL104", "3:19 (evaluate.every)", "1 or more", ""),
        (
            "optimizers: {type: SGD}\nnonfinite: {policy: skip}",
            "SL102",
            "3:21 (nonfinite.max_consecutive)",
            "patience",
            "max_consecutive",
        ),
        (
            "optimizers: {type: SGD}\nnonfinite: {policy: ignore}",
            "SL104",
            "3:21 (nonfinite.policy)",
            "'raise' or 'skip'",
            "",
        ),
        ("optimizers: {type: SGD}\nfrozen: a.*", "SL103", "3:9 (frozen)", "a list", "['a.*']"),
    ],
)
def test_each_kind_of_mistake_says_what_where_and_the_fix(refused, text, code, place, what, fix):
    error = refused("run: {max_steps: 1}\n" + text, given=["model", "data", "trainer"])
    fault = error.fault
    assert (fault.code, fault.where, error.others) == (code, f"config.yaml:{place}", ())
    assert what in fault.what
    assert fix in fault.fix


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CPU", "cuda:1\n"])
def test_an_unknown_device_is_refused(refused, device):
    error = refused(
        f"run: {{max_steps: 1, device: {device!r}}}".replace("'", '"'), given=["model", "data", "trainer", "optimizers"]
    )
    assert error.fault.code == "SL104"


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "", "x" * 101, "a b", "a\n", "-x", "é"])
def test_a_bad_run_name_is_refused(name):
    with pytest.raises(ConfigError) as caught:
        load(
            sections={"run": {"name": name, "max_steps": 1}},
            environment={},
            given=["model", "data", "trainer", "optimizers"],
        )
    assert [problem.fault.code for problem in caught.value.problems] == ["SL116"]


def test_what_a_run_needs_is_named_all_at_once(refused):
    error = refused("frozen: []\n")
    assert [(problem.fault.code, problem.path) for problem in error.problems] == [
        ("SL102", "run"),
        ("SL102", "model"),
        ("SL102", "data.train"),
        ("SL102", "optimizers"),
        ("SL117", "losses"),
    ]


def test_a_schedule_shorter_than_the_run_is_refused(refused):
    scheduler = "{type: OneCycleLR, max_lr: 1.0, total_steps: 10}"
    text = f"run: {{max_steps: 11}}\noptimizers: {{type: SGD, momentum: 0.9, scheduler: {scheduler}}}"
    error = refused(text, given=["model", "data", "trainer"])
    assert (error.fault.code, error.problems[0].path) == ("SL114", "optimizers.main.scheduler.total_steps")


def test_an_argument_that_torch_refuses_in_a_group_or_schedule_is_pointed_at(refused):
    text = """\
run: {max_steps: 1}
optimizers:
  a: {type: Adam, params: ["a.*"], groups: [{params: ["*.bias"], betas: [0.9, 3.0]}]}
  b: {type: SGD, nesterov: true, params: ["b.*"]}
  c: {type: Adagrad, params: rest, scheduler: {type: CyclicLR, base_lr: 0.1, max_lr: 1.0}}
"""
    error = refused(text, given=["model", "data", "trainer"])
    assert [(problem.fault.code, str(problem.at), problem.path) for problem in error.problems] == [
        ("SL114", "config.yaml:3:73", "optimizers.a.groups.0.betas"),
        ("SL114", "config.yaml:4:28", "optimizers.b.nesterov"),
        ("SL114", "config.yaml:5:36", "optimizers.c.scheduler"),
    ]


def test_control_characters_cannot_drive_the_terminal(refused):
    text = 'run: {max_steps: 1, "\\e[31mred": 1, name: "\\e]0;title\\a", "\u202eabc": 2}\n'
    shown = str(refused(text, given=["model", "data", "trainer", "optimizers"]))
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "\u202e" not in shown
    assert "\\x1b[31mred" in shown


def test_the_caret_stands_under_the_culprit_in_a_long_line_and_beside_escapes():
    text = "x" * 300 + "BAD" + "y" * 300
    lines = render(Problem(Fault("SL101", "t", "w"), Origin("a", 1, 301, 3, text))).splitlines()
    assert all(len(line) <= 140 for line in lines)
    start = lines[4].index("^")
    assert lines[3][start : start + 3] == "BAD"
    lines = render(Problem(Fault("SL101", "t", "w"), Origin("a", 1, 3, 3, "\t\x1bBAD"))).splitlines()
    start = lines[4].index("^")
    assert lines[3][start : start + 3] == "BAD"


def test_the_same_problem_is_shown_once_and_in_the_order_of_the_file():
    one, two = (Problem(Fault("SL101", "t", f"w{line}"), Origin("a", line, 1, 1, "text")) for line in (2, 1))
    error = ConfigError([one, two, one])
    assert [fault.what for fault in (error.fault, *error.others)] == ["w1", "w2"]


def test_the_error_survives_pickling():
    error = ConfigError([Problem(Fault("SL101", "t", "w"), Origin("a", 1, 1, 1, "text"), "p")])
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.fault) == (str(error), error.fault)


def test_a_key_that_is_called_like_the_type_does_not_shift_the_place(refused):
    text = "run: {max_steps: 1}\noptimizers: {main: {type: SGD, SGD: {lr: 1}, lr: x}}\nlosses: {target: {weight: x}}"
    error = refused(text, given=["model", "data", "trainer"])
    assert [problem.path for problem in error.problems] == [
        "optimizers.main.SGD",
        "optimizers.main.lr",
        "losses.target.weight",
    ]
