"""Replay bundles: written by a failing run, opened again, refused when damaged."""

from __future__ import annotations

import hashlib
import json
import math
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import safeloop as sl
from safeloop.bundles import read_bundle
from safeloop.bundles.structure import NotStorable, pack, unpack
from safeloop.cli.main import app

MODULE = """
import torch
import safeloop as sl
from torch import nn

class Net(nn.Sequential):
    def __init__(self, width=8):
        super().__init__(nn.Linear(64, width), nn.BatchNorm1d(width), nn.Dropout(0.2), nn.Linear(width, 10))

class Fails(sl.Trainer):
    def losses(self, batch):
        images, labels = batch
        out = self.model(images)
        gap = (out[:, None] - out[None]).square().sum(-1)
        gap = gap.sqrt() if self.step == 2 else gap  # the line
        return {"ce": nn.functional.cross_entropy(out, labels), "gap": gap.mean()}
"""
CONFIG = """\
run: {name: fails, dir: runs, max_steps: 4, device: cpu}
trainer: {target: "replay_user_code:Fails"}
model: {target: "replay_user_code:Net"}
data:
  train: {target: "safeloop.datasets:Digits", args: {split: train, flat: true}}
  batch_size: 16
optimizers: {type: SGD, lr: 0.1}
log: {sinks: [jsonl]}
"""


class Root(sl.Trainer):
    def loss(self, batch):
        return (self.model(batch["x"]) * batch["scale"]).square().sum(1).sqrt().mean()


def in_code(**sections):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
    data = [{"x": torch.randn(8, 4), "scale": scale} for scale in (1.0, 1.0, 0.0)]
    sections = {"run": {"max_steps": 3, "name": "fails"}, "log": {"sinks": ["jsonl"]}, **sections}
    return Root(model=model, data=data, optimizers={"type": "AdamW", "lr": 1e-2}, **sections)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("replay_user_code", None)


@pytest.fixture
def bundle(here):
    with pytest.raises(sl.FaultError) as caught:
        in_code().fit()
    path = here / "runs/fails/bundles/step-2"
    assert f"safeloop replay {path.relative_to(here)}" in caught.value.fault.where
    return path


def test_a_bundle_gives_the_same_values_and_the_same_fault(bundle):
    replayed = sl.replay(bundle, in_code())
    assert replayed.note == ""
    assert "born in `SqrtBackward0`" in replayed.faults[0].where
    assert str(replayed.faults[0]).splitlines()[1] in read_bundle(bundle).fault


def test_a_replay_does_not_draw_from_the_random_state(bundle):
    run = in_code()
    run.check()
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    sl.replay(bundle, run)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_no_bundle_is_written_where_none_is_wanted(here):
    with pytest.raises(sl.FaultError) as caught:
        in_code(nonfinite={"save_bundle": False}).fit()
    assert not (here / "runs/fails/bundles").exists()
    assert "safeloop replay" not in caught.value.fault.where


def test_a_bundle_is_readable_by_its_user_alone(bundle):
    assert {path.stat().st_mode & 0o077 for path in (bundle, *bundle.iterdir())} == {0}


def test_the_command_builds_the_trainer_from_the_bundle(here):
    (here / "replay_user_code.py").write_text(MODULE)
    (here / "c.yaml").write_text(CONFIG)
    args = ["--allow-module", "replay_user_code"]
    assert CliRunner().invoke(app, ["train", "c.yaml", *args]).exit_code == 3
    done = CliRunner().invoke(app, ["replay", "runs/fails/bundles/step-2", *args])
    assert done.exit_code == 0, done.output
    assert "born in `SqrtBackward0`, replay_user_code.py:15" in done.stdout
    assert "run again with the same values, bit by bit" in done.stdout


def test_the_command_obeys_the_list_of_allowed_modules(here):
    (here / "replay_user_code.py").write_text(MODULE)
    (here / "c.yaml").write_text(CONFIG)
    CliRunner().invoke(app, ["train", "c.yaml", "--allow-module", "replay_user_code"])
    sys.modules.pop("replay_user_code", None)
    done = CliRunner().invoke(app, ["replay", "runs/fails/bundles/step-2"])
    assert done.exit_code == 2
    assert "SL110" in done.stderr
    assert "replay_user_code" not in sys.modules, "nothing was imported"


def test_the_command_says_that_a_run_from_code_needs_python(bundle):
    done = CliRunner().invoke(app, ["replay", str(bundle)])
    assert done.exit_code == 6
    assert "SL864" in done.stderr
    assert "model" in done.stderr


def damages():
    def flip(path):
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)

    def cut(path):
        path.write_bytes(path.read_bytes()[:-7])

    def swap(path):
        path.unlink()
        path.symlink_to("/etc/hostname")

    files = ("config.yaml", "tensors.safetensors", "manifest.json")
    kinds = {
        "flip": flip,
        "cut": cut,
        "empty": lambda p: p.write_bytes(b""),
        "gone": lambda p: p.unlink(),
        "link": swap,
    }
    return [pytest.param(f, kind, id=f"{f} {name}") for f in files for name, kind in kinds.items()]


@pytest.mark.parametrize(("name", "damage"), damages())
def test_a_damaged_bundle_is_refused(bundle, name, damage):
    state = json.loads((bundle / "manifest.json").read_text())
    damage(bundle / name)
    try:
        if json.loads((bundle / "manifest.json").read_text()) == state and name == "manifest.json":
            return  # the bit was in a space
    except (ValueError, OSError):
        pass
    try:
        replayed = sl.replay(bundle, in_code())
    except sl.FaultError as error:
        assert error.fault.code in ("SL861", "SL863")
        assert error.exit_code == 6
    else:  # a letter of a text in the manifest, which decides nothing
        assert (name, replayed.note) == ("manifest.json", "")


def rewritten(bundle, **changes):
    state = json.loads((bundle / "manifest.json").read_text())
    state |= changes
    (bundle / "manifest.json").write_text(json.dumps(state))
    return bundle


HOSTILE = {
    "deep": {"window": [{"list": [{"list": []}]}]},
    "unknown kind": {"window": [{"pickle": "gASV"}]},
    "foreign tensor": {"window": [{"tensor": "../../etc/passwd"}]},
    "no state": {"random": {"python": [3, None], "numpy": ["PCG64", 0, 0, 0.0], "cuda": []}},
    "no phase": {"phase": "other"},
    "other format": {"format": 99},
    "strange sums": {"sha256": ["a"]},
    "further file": {"sha256": {"../../x": "0"}},
}


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE)
def test_a_manifest_with_other_content_is_refused_or_fails_in_the_users_code(bundle, changes):
    with_depth = changes
    if "window" in changes and "list" in changes["window"][0]:
        part = {"value": 1}
        for _ in range(200):
            part = {"list": [part]}
        with_depth = {"window": [part]}
    with pytest.raises(sl.FaultError) as caught:
        sl.replay(rewritten(bundle, **with_depth), in_code())
    assert caught.value.fault.code in ("SL861", "SL863")


def test_a_config_that_was_changed_together_with_its_checksum_still_runs_nothing_that_is_not_allowed(here):
    (here / "replay_user_code.py").write_text(MODULE)
    (here / "c.yaml").write_text(CONFIG)
    CliRunner().invoke(app, ["train", "c.yaml", "--allow-module", "replay_user_code"])
    path = here / "runs/fails/bundles/step-2"
    text = (path / "config.yaml").read_text().replace("replay_user_code:Net", "os:system")
    (path / "config.yaml").write_text(text)
    sums = {n: hashlib.sha256((path / n).read_bytes()).hexdigest() for n in ("config.yaml", "tensors.safetensors")}
    with pytest.raises(sl.FaultError) as caught:
        sl.replay(rewritten(path, sha256=sums), allow_modules=["replay_user_code"])
    assert caught.value.fault.code == "SL110"


BATCHES = [
    {"x": torch.arange(6).view(2, 3), "n": 3, "w": 0.1, "flag": True, "name": "a\u00e9", "none": None},
    (torch.randn(2), [1, (2.5, math.inf)], {3: "three"}),
    [torch.zeros(0, 4), torch.tensor(2.0, dtype=torch.bfloat16), torch.ones(2, 2).t()],
]


@pytest.mark.parametrize("batch", BATCHES, ids=["dict", "tuple", "list"])
def test_a_batch_comes_back_as_it_was(batch):
    tensors = {}
    back = unpack(json.loads(json.dumps(pack(batch, tensors, "batch"))), tensors)
    assert type(back) is type(batch)
    assert repr(back) == repr(batch)


class Sample:
    def __init__(self, x):
        self.x = x


@pytest.mark.parametrize("part", [Sample(1), b"bytes", {(1, 2): 3}, np.zeros(2), {1, 2}, nn.Parameter(torch.ones(1))])
def test_what_a_bundle_cannot_hold_is_named(part):
    with pytest.raises(NotStorable, match=r"batch\[\"deep\"\]\[1\]"):
        pack({"deep": [0, part]}, {}, "batch")


class Fails(sl.Trainer):
    """Fails on the third batch in one of several ways, with dropout and batch normalisation before that."""

    kind = "forward"

    def loss(self, batch):
        out = self.model(batch["x"])
        if batch["scale"] == 0.0:
            if self.kind == "forward":
                out = out[:, [5]]  # the wrong column
            elif self.kind == "constant":
                out = out.detach()
            elif self.kind == "backward":
                out = FailsBackward.apply(out)
        return out.square().mean()


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, gradient):
        raise ValueError(f"no derivative at {float(gradient.sum()):.12g}")


def failing(kind, **sections):
    run = in_code(**sections)
    run.__class__ = type("Run", (Fails,), {"kind": kind})
    return run


KINDS = {"forward": IndexError, "constant": sl.FaultError, "backward": ValueError}


@pytest.mark.parametrize(("kind", "expected"), KINDS.items(), ids=KINDS)
def test_a_step_that_fails_is_saved_and_fails_again_in_the_same_way(here, kind, expected):
    run = failing(kind)
    with pytest.raises(expected) as caught:
        run.fit()
    note = str(caught.value) + " ".join(getattr(caught.value, "__notes__", []))
    if sys.version_info >= (3, 11):
        assert "safeloop replay runs/fails/bundles/step-2" in " ".join(note.split())
    replayed = sl.replay(here / "runs/fails/bundles/step-2", failing(kind))
    assert replayed.note == "", "the same text, of numbers that depend on the dropout mask, the weights and buffers"
    assert "has ended in the same error" in str(replayed)
    where = {"forward": "# the wrong column", "constant": "SL404", "backward": "raise ValueError"}[kind]
    assert where in str(replayed)


def test_the_buffers_of_a_step_that_fails_are_those_from_before_it(here):
    run = failing("forward", log={"sinks": []})
    with pytest.raises(IndexError):
        run.fit()
    assert run.model[1].num_batches_tracked == 2


def test_a_mistake_that_shows_at_the_first_step_is_not_saved(here):
    with pytest.raises(IndexError):
        failing_at_once().fit()
    assert not (here / "runs/fails/bundles").exists()


def failing_at_once():
    model = nn.Sequential(nn.Linear(4, 2))
    data = [{"x": torch.randn(8, 4), "scale": 0.0}]
    sections = {"run": {"max_steps": 3, "name": "fails"}, "log": {"sinks": ["jsonl"]}}
    return type("Run", (Fails,), {"kind": "forward"})(
        model=model, data=data, optimizers={"type": "SGD", "lr": 0.1}, **sections
    )


def test_a_saved_failure_that_does_not_come_again_is_said_so(here):
    with pytest.raises(IndexError):
        failing("forward").fit()
    replayed = sl.replay(here / "runs/fails/bundles/step-2", failing("none"))
    assert "ended in no error" in replayed.note
    assert "IndexError" in str(replayed)
