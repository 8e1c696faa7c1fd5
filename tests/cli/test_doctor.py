from __future__ import annotations

import json

import pytest

from safeloop.doctor import read_run


@pytest.fixture
def trained(project, safeloop):
    """Trains the small config of this folder with overrides; gives the run's folder."""

    def train(*overrides):
        sinks = ["run.max_steps=60", "log.every=2", "log.sinks=[jsonl]"]
        done = safeloop("train", "digits.yaml", *sinks, *overrides, "-q")
        assert done.exit_code == 0, done.stderr
        return done.stdout.strip()

    return train


def test_a_run_that_learned_is_healthy_and_ends_with_0(trained, safeloop):
    path = trained()
    done = safeloop("doctor", path)
    assert (done.exit_code, done.stderr) == (0, "")
    assert "loss/train" in done.stdout
    found = json.loads(safeloop("doctor", path, "--json").stdout)["findings"]
    assert [one["title"] for one in found if one["title"] != "the run gets slower"] == []  # the machine may be shared


@pytest.mark.parametrize(
    ("override", "title"),
    [
        ("optimizers.lr=1e-12", "the loss does not fall"),
        ("optimizers.max_norm=1e-6", "clipping of `main` cuts every step"),
        ("optimizers.scheduler={type: PolynomialLR, total_iters: 20}", "the learning rate of `main` is zero"),
    ],
)
def test_a_run_that_went_wrong_ends_with_3_and_says_what(override, title, trained, safeloop):
    path = trained(override)
    done = safeloop("doctor", path)
    assert done.exit_code == 3, done.stdout
    assert title in done.stdout
    as_json = json.loads(safeloop("doctor", path, "--json").stdout)
    assert as_json["verdict"] == "serious"
    assert title in [finding["title"] for finding in as_json["findings"]]
    assert {"level", "title", "what", "why", "fix", "config"} == set(as_json["findings"][0])


def test_a_folder_that_is_no_run_ends_with_6(project, safeloop):
    done = safeloop("doctor", "runs/none")
    assert (done.exit_code, done.stdout) == (6, "")
    assert "SL865" in done.stderr
    done = safeloop("doctor", str(project), "--json")
    assert done.exit_code == 6
    assert json.loads(done.stderr)["error"]["code"] == "SL865"


def test_a_run_that_ended_in_a_fault_is_told(project, safeloop):
    done = safeloop("train", "digits.yaml", "optimizers.lr=1e38", "log.every=1", "log.sinks=[jsonl]", "-q")
    assert done.exit_code == 3
    done = safeloop("doctor", "runs/digits")
    assert done.exit_code == 3, done.stdout
    assert read_run("runs/digits").faults
    assert "serious: SL" in done.stdout
