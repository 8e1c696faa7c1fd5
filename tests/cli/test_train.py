from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch


def test_a_run_ends_with_its_metrics_and_the_address_of_its_dashboard(project, safeloop):
    done = safeloop("train", "digits.yaml")
    assert done.exit_code == 0, done.stderr
    text = done.stdout
    assert "6 steps" in text
    assert text.rindex("accuracy") < text.rindex(str(Path("runs/digits"))) < text.rindex("tensorboard --logdir")
    assert re.search(r"http://\S+#custom_scalars$", text.rstrip())
    assert (project / "runs" / "digits").is_dir()


def test_a_config_without_the_console_sink_ends_with_the_run_folder_alone(project, safeloop):
    assert safeloop("train", "digits.yaml", "log.sinks=[jsonl]").stdout == f"{Path('runs/digits')}\n"


def test_overrides_win_over_the_file(project, safeloop):
    done = safeloop("train", "digits.yaml", "run.max_steps=2", "run.name=short", "--quiet")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"{Path('runs/short')}\n"
    assert "max_steps: 2" in (project / "runs" / "short" / "config.yaml").read_text()


def test_quiet_prints_the_run_folder_alone(project, safeloop):
    done = safeloop("train", "digits.yaml", "--quiet")
    assert (done.exit_code, done.stdout, done.stderr) == (0, f"{Path('runs/digits')}\n", "")


def test_a_quiet_run_still_writes_its_metrics(project, safeloop):
    safeloop("train", "digits.yaml", "--quiet")
    assert (project / "runs" / "digits" / "metrics.jsonl").read_text().count("\n") >= 3


def test_json_is_one_object_with_the_result(project, safeloop):
    done = safeloop("train", "digits.yaml", "--log-format", "json")
    assert (done.exit_code, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert (result["outcome"], result["steps"], result["dir"]) == ("finished", 6, str(Path("runs/digits")))
    assert 0.0 <= result["metrics"]["accuracy"] <= 1.0


def test_a_warning_of_the_config_is_said_once_on_stderr(project, safeloop):
    done = safeloop("train", "digits.yaml", "optimizers.main.lr=0.0", "--quiet")
    assert done.exit_code == 0
    assert done.stderr.count("SL115 ") == 1


def test_warnings_are_in_the_json_result(project, safeloop):
    done = safeloop("train", "digits.yaml", "optimizers.main.lr=0.0", "--log-format", "json")
    assert [fault["code"] for fault in json.loads(done.stdout)["faults"]] == ["SL115"]


def test_a_config_mistake_exits_2_with_its_place_on_stderr(project, safeloop):
    done = safeloop("train", "digits.yaml", "optimizers.main.lrr=1")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "error[SL101]" in done.stderr
    assert "'lrr'" in done.stderr
    assert not (project / "runs").exists()


def test_a_config_mistake_is_one_json_object_where_json_is_wanted(project, safeloop):
    done = safeloop("train", "digits.yaml", "optimizers.main.lrr=1", "run.seed=-1", "--log-format", "json")
    assert done.exit_code == 2
    answer = json.loads(done.stderr)
    assert {fault["code"] for fault in [answer["error"], *answer["others"]]} == {"SL101", "SL104"}


@pytest.mark.parametrize(
    ("arguments", "code", "status"),
    [
        (["nowhere.yaml"], "SL108", 2),
        (["digits.yaml", "run.max_steps"], "SL109", 2),
        (["digits.yaml", "model.target=os:system"], "SL110", 2),
        (["digits.yaml", 'optimizers={type: SGD, lr: 0.1, params: ["weight"]}'], "SL201", 3),
        (["digits.yaml", "run.dir=digits.yaml/runs"], "SL856", 6),
    ],
)
def test_the_exit_code_tells_what_was_wrong(project, safeloop, arguments, code, status):
    done = safeloop("train", *arguments)
    assert done.exit_code == status, done.stderr
    assert code in done.stderr
    assert done.stdout == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is there")
def test_a_missing_device_exits_6(project, safeloop):
    done = safeloop("train", "digits.yaml", "run.device=cuda")
    assert done.exit_code == 6
    assert "SL853" in done.stderr


def test_an_exception_of_the_users_code_keeps_its_traceback_and_exits_1(safeloop, config_with_trainer):
    done = safeloop("train", config_with_trainer("Breaks"), "--quiet")
    assert done.exit_code == 1
    assert "cli_user_code.py" in done.stderr
    assert done.stderr.rstrip().endswith("ValueError: the user's own mistake")
    assert str(Path("safeloop/cli")) not in done.stderr


def test_an_exception_of_the_users_code_is_one_json_object_where_json_is_wanted(safeloop, config_with_trainer):
    done = safeloop("train", config_with_trainer("Breaks"), "--log-format", "json")
    assert done.exit_code == 1
    error = json.loads(done.stderr)["error"]
    assert (error["type"], error["what"]) == ("ValueError", "the user's own mistake")
    assert "cli_user_code.py" in error["traceback"]


def test_an_interrupted_run_exits_130(safeloop, config_with_trainer):
    assert safeloop("train", config_with_trainer("Interrupts"), "--quiet").exit_code == 130


def test_a_module_is_allowed_on_the_command_line(project, safeloop, config_with_trainer):
    name = config_with_trainer("Computes")
    (project / "pyproject.toml").write_text("")
    refused = safeloop("train", name)
    assert refused.exit_code == 2
    assert "SL110" in refused.stderr
    allowed = safeloop("train", name, "--allow-module", "cli_user_code", "--quiet")
    assert allowed.exit_code == 0, allowed.stderr
