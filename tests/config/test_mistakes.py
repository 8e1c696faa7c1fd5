"""The 25 config mistakes, each refused (three warned of) with file:line:column and the key."""

from __future__ import annotations

import pytest

LR, BETAS, NORM, STEPS = "    lr: 1e-3", "    betas: [0.9, 0.99]", "    max_norm: 1.0", "max_steps: 100"
REFUSED = {
    "lr -1": (LR, "    lr: -1", "SL104", "9:9", "optimizers.main.lr"),
    "lr inf": (LR, "    lr: .inf", "SL104", "9:9", "optimizers.main.lr"),
    "lr nan": (LR, "    lr: .nan", "SL104", "9:9", "optimizers.main.lr"),
    "lr fast": (LR, "    lr: fast", "SL103", "9:9", "optimizers.main.lr"),
    "lr in quotes": (LR, "    lr: '1e-3'", "SL103", "9:9", "optimizers.main.lr"),
    "unknown key": (LR, "    lrr: 1e-3", "SL101", "9:5", "optimizers.main.lrr"),
    "max_steps -5": (STEPS, "max_steps: -5", "SL104", "1:32", "run.max_steps"),
    "max_steps 2.5": (STEPS, "max_steps: 2.5", "SL103", "1:32", "run.max_steps"),
    "max_steps in quotes": (STEPS, "max_steps: '10'", "SL103", "1:32", "run.max_steps"),
    "max_steps true": (STEPS, "max_steps: true", "SL103", "1:32", "run.max_steps"),
    "clip -1": (NORM, "    max_norm: -1", "SL104", "11:15", "optimizers.main.max_norm"),
    "clip abc": (NORM, "    max_norm: abc", "SL103", "11:15", "optimizers.main.max_norm"),
    "clip nan": (NORM, "    max_norm: .nan", "SL104", "11:15", "optimizers.main.max_norm"),
    "accumulation 0": (
        "losses:",
        "accumulate: {micro_batches: 0}\nlosses:",
        "SL104",
        "13:29",
        "accumulate.micro_batches",
    ),
    "accumulation -2": (
        "losses:",
        "accumulate: {micro_batches: -2}\nlosses:",
        "SL104",
        "13:29",
        "accumulate.micro_batches",
    ),
    "batch size 0": ("batch_size: 64", "batch_size: 0", "SL104", "5:15", "data.batch_size"),
    "batch size -4": ("batch_size: 64", "batch_size: -4", "SL104", "5:15", "data.batch_size"),
    "precision banana": (STEPS, STEPS + ", precision: banana", "SL104", "1:48", "run.precision"),
    "save interval 0": ("losses:", "checkpoint: {every: 0}\nlosses:", "SL101", "13:1", "checkpoint"),
    "save interval -3": ("losses:", "checkpoint: {every: -3}\nlosses:", "SL101", "13:1", "checkpoint"),
    "seed -1": (STEPS, STEPS + ", seed: -1", "SL104", "1:43", "run.seed"),
    "betas 2.0": (BETAS, "    betas: [0.9, 2.0]", "SL114", "10:12", "optimizers.main.betas"),
}
WARNED = {
    "lr 0": (LR, "    lr: 0", "9:9", "optimizers.main.lr"),
    "lr 1000": (LR, "    lr: 1000", "9:9", "optimizers.main.lr"),
    "max_steps 0": (STEPS, "max_steps: 0", "1:32", "run.max_steps"),
}


@pytest.mark.parametrize(("old", "new", "code", "place", "key"), REFUSED.values(), ids=REFUSED)
def test_a_mistake_is_refused_at_its_place(refused, valid, old, new, code, place, key):
    assert valid.count(old) == 1
    error = refused(valid.replace(old, new))
    assert [fault.code for fault in (error.fault, *error.others)] == [code]
    assert error.fault.where == f"config.yaml:{place} ({key})"
    assert f"--> config.yaml:{place}  ({key})" in str(error)
    assert error.exit_code == 2


@pytest.mark.parametrize(("old", "new", "place", "key"), WARNED.values(), ids=WARNED)
def test_an_arguable_value_is_warned_of_at_its_place(load_text, valid, old, new, place, key):
    (warning,) = load_text(valid.replace(old, new)).warnings
    assert (warning.code, warning.severity) == ("SL115", "warning")
    assert warning.where == f"config.yaml:{place} ({key})"


def test_all_mistakes_are_counted():
    assert len(REFUSED) + len(WARNED) == 25


def test_what_is_right_is_loaded_without_a_warning(load_text, valid):
    assert load_text(valid).warnings == []


@pytest.mark.parametrize("key", ["clip", "checkpoint", "max_grad_norm"])
def test_a_key_that_belongs_elsewhere_or_nowhere_is_unknown(refused, valid, key):
    error = refused(valid + f"{key}: 1\n")
    assert error.fault.code == "SL101"
    assert ("optimizers.<name>.max_norm" in error.fault.fix) == ("clip" in key or "norm" in key)


def test_dozens_of_mistakes_are_all_shown(refused):
    names = [f"o{index}" for index in range(40)]
    lines = [f"  {name}: {{type: SGD, lr: -1, params: ['{name}.*'], momentun: 0.9}}" for name in names]
    error = refused("run: {max_steps: 1}\noptimizers:\n" + "\n".join(lines) + "\n", given=["model", "data", "trainer"])
    assert len(error.problems) == 80
    text = str(error)
    for line, name in enumerate(names, start=3):
        assert f"config.yaml:{line}:" in text
        assert f"(optimizers.{name}.lr)" in text
        assert f"(optimizers.{name}.momentun)" in text
    assert "80 errors; nothing was run" in text


def test_an_argument_torch_refuses_is_found_beside_other_mistakes(refused, valid):
    error = refused(valid.replace(BETAS, "    betas: [0.9, 2.0]\n    lrr: 1").replace("T_max: 100", "T_max: x"))
    assert {problem.path for problem in error.problems} == {
        "optimizers.main.betas",
        "optimizers.main.lrr",
        "optimizers.main.scheduler.T_max",
    }
