"""Bad input through the command line: each ends before the first update, with its code, exit code, place and fix."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from typer.testing import CliRunner, Result

from safeloop.cli.main import app

CONFIG = """\
run: {name: bad, max_steps: 3, device: cpu}
trainer: {target: "bad_input_code:Good"}
model: {target: "bad_input_code:Net", args: {width: 4}}
data:
  train: {target: "bad_input_code:Blobs", args: {size: 32}}
  batch_size: 8
optimizers:
  main: {type: AdamW, lr: 1e-3}
losses: {classify: {weight: 1.0}}
log: {every: 1, sinks: [jsonl]}
"""

CODE = """\
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

import safeloop as sl

BUILT = []


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body, self.head = nn.Linear(3, width), nn.Linear(width, 2)
        BUILT.append((self, {name: tensor.clone() for name, tensor in self.state_dict().items()}))

    def forward(self, x):
        return self.head(self.body(x).relu())


class Blobs(Dataset):
    def __init__(self, size):
        self.x, self.y = torch.randn(size, 3), torch.arange(size) % 2

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.y[index]


class FromFile(Blobs):
    def __init__(self, path):
        with open(path) as file:
            super().__init__(len(file.read()))


class Opaque:
    def __init__(self, samples):
        self.x = torch.empty(len(samples), 3, device="meta")


class Stuck(DataLoader):
    def __init__(self, size):
        super().__init__(Blobs(size), batch_size=8, collate_fn=Opaque)


class Good(sl.Trainer):
    def losses(self, batch):
        x, y = batch
        return {"classify": F.cross_entropy(self.model(x), y)}


class Infinite(sl.Trainer):
    def losses(self, batch):
        x, y = batch
        return {"classify": F.cross_entropy(self.model(x), y) / 0.0}


class BadGradient(sl.Trainer):
    def losses(self, batch):
        scores = self.model(batch[0])
        return {"classify": (scores - scores.detach()).square().sum(1).sqrt().mean()}


class Number(sl.Trainer):
    def losses(self, batch):
        x, y = batch
        return {"classify": F.cross_entropy(self.model(x), y).item()}


class Silent(sl.Trainer):
    pass


class Both(Good):
    def loss(self, batch):
        return self.losses(batch)["classify"]
"""

LR, STEPS, SIZE = "lr: 1e-3", "max_steps: 3", 'Blobs", args: {size: 32}'
MAIN = "  main: {type: AdamW, lr: 1e-3}"
TRAINER, LOSSES = "bad_input_code:Good", "losses: {classify: {weight: 1.0}}"


class Mistake(NamedTuple):
    old: str
    new: str
    code: str
    status: int
    place: str
    """what the text shows of where it is"""
    fix: str
    """a part of the fix, or of the text that stands for it"""


MISTAKES = {
    "a misspelled key": Mistake(LR, "lrr: 1e-3", "SL101", 2, "bad.yaml:8:23", "did you mean 'lr'"),
    "an unknown section": Mistake(
        "optimizers:", "optimisers:", "SL101", 2, "bad.yaml:7:1", "did you mean 'optimizers'"
    ),
    "a missing key": Mistake("max_steps: 3, ", "", "SL102", 2, "bad.yaml:1:", "max_steps"),
    "a learning rate of true": Mistake(LR, "lr: true", "SL103", 2, "bad.yaml:8:27", "number"),
    "a learning rate in quotes": Mistake(LR, 'lr: "1e-3"', "SL103", 2, "bad.yaml:8:27", "quotes"),
    "a learning rate of nan": Mistake(LR, "lr: .nan", "SL104", 2, "bad.yaml:8:27", "finite"),
    "a negative learning rate": Mistake(LR, "lr: -1", "SL104", 2, "bad.yaml:8:27", "0"),
    "two and a half steps": Mistake(STEPS, "max_steps: 2.5", "SL103", 2, "bad.yaml:1:29", "whole"),
    "an optimizer that torch has not": Mistake("AdamW", "AdamX", "SL105", 2, "bad.yaml:8:16", "AdamW"),
    "an argument that torch refuses": Mistake(LR, "lr: 1e-3, betas: [0.9, 2.0]", "SL114", 2, "bad.yaml:8:", "betas"),
    "a key given twice": Mistake(LR, "lr: 1e-3, lr: 2e-3", "SL106", 2, "bad.yaml:8:33", "lr"),
    "a bracket left open": Mistake(
        LOSSES, "losses: {classify: {weight: 1.0}", "SL107", 2, "bad.yaml:10:1", "expected ',' or '}'"
    ),
    "a config to extend that is not there": Mistake(
        "trainer:", "extends: nowhere.yaml\ntrainer:", "SL108", 2, "bad.yaml:2:10", "nowhere.yaml"
    ),
    "a module that is not allowed": Mistake(
        "bad_input_code:Net", "subprocess:Popen", "SL110", 2, "bad.yaml:3:17", "allow_modules"
    ),
    "a class that is not there": Mistake(
        "bad_input_code:Net", "bad_input_code:Nett", "SL111", 2, "bad.yaml:3:17", "Net"
    ),
    "a target of the wrong class": Mistake(
        "bad_input_code:Net", "bad_input_code:Blobs", "SL112", 2, "bad.yaml:3:17", "Module"
    ),
    "a trainer that is none": Mistake(TRAINER, "bad_input_code:Net", "SL112", 2, "bad.yaml:2:19", "Trainer"),
    "an argument that the class has not": Mistake("width: 4", "wdith: 4", "SL113", 2, "bad.yaml:3:", "width"),
    "no loss at all": Mistake(f'{TRAINER}"}}', 'bad_input_code:Silent"}', "SL117", 2, "", "loss"),
    "both loss and losses": Mistake(TRAINER, "bad_input_code:Both", "SL118", 2, "bad_input_code.py", "keep"),
    "a pattern that leaves parameters out": Mistake(
        LR, "lr: 1e-3, params: ['head.*']", "SL201", 3, "`main`", "optimizers.main.params"
    ),
    "patterns that overlap": Mistake(
        MAIN, f"{MAIN}\n  other: {{type: SGD, lr: 1e-3, params: ['head.*']}}", "SL202", 3, "`other`", "params"
    ),
    "a pattern that matches nothing": Mistake(
        LR, "lr: 1e-3, params: ['*', 'haed.*']", "SL203", 3, "bad.yaml:8:41", "head"
    ),
    "a frozen pattern that matches nothing": Mistake(
        "optimizers:", "frozen: ['haed.*']\noptimizers:", "SL203", 3, "bad.yaml:7:9", "head"
    ),
    "a declared loss that never comes": Mistake(LOSSES, "losses: {clasify: {weight: 1.0}}", "SL407", 3, "", "classify"),
    "a loss that is a number": Mistake(TRAINER, "bad_input_code:Number", "SL402", 3, "bad_input_code.py", ".item()"),
    "data without a sample": Mistake(SIZE, 'Blobs", args: {size: 0}', "SL851", 6, "", "data"),
    "a batch that cannot move": Mistake("Blobs", "Stuck", "SL852", 6, "", "to(device)"),
    "a device that is not there": Mistake("device: cpu", "device: 'cuda:63'", "SL853", 6, "cuda:63", "run.device"),
}
ONLY_WHEN_TRAINING = {
    "a loss that is infinite": Mistake(TRAINER, "bad_input_code:Infinite", "SL405", 3, "step 0", "born in `div`"),
    "a gradient that is not finite": Mistake(TRAINER, "bad_input_code:BadGradient", "SL501", 3, "step 0", "sqrt"),
    "a run folder below a file": Mistake("device: cpu", "device: cpu, dir: bad.yaml/runs", "SL856", 6, "", "run.dir"),
}


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The user's module, importable from the current folder; `BUILT` holds each net with its state at birth."""
    (tmp_path / "bad_input_code.py").write_text(CODE)
    (tmp_path / "pyproject.toml").write_text('[tool.safeloop]\nallow_modules = ["bad_input_code"]\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("NO_COLOR", "1")
    import bad_input_code

    yield bad_input_code
    del sys.modules["bad_input_code"]


def run(command: str, text: str) -> Result:
    Path("bad.yaml").write_text(text)
    return CliRunner().invoke(app, [command, "bad.yaml"])


def assert_nothing_was_trained(code: ModuleType) -> None:
    for net, state in code.BUILT:
        assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert not [path for path in Path.cwd().rglob("*.safetensors") if "bundles" not in path.parts]


def assert_refused(done: Result, mistake: Mistake) -> None:
    shown = " ".join(done.stderr.split())
    assert done.exit_code == mistake.status, done.output
    assert mistake.code in shown
    assert mistake.place in shown
    assert mistake.fix in shown
    assert "Traceback" not in done.stderr
    assert {"fix", "help:", "expected"} & set(shown.split())
    assert done.stdout == ""


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_refused_before_the_first_update(code: ModuleType, mistake: Mistake, command: str) -> None:
    assert CONFIG.count(mistake.old) == 1
    assert_refused(run(command, CONFIG.replace(mistake.old, mistake.new)), mistake)
    assert_nothing_was_trained(code)


@pytest.mark.parametrize("mistake", ONLY_WHEN_TRAINING.values(), ids=ONLY_WHEN_TRAINING)
def test_what_only_training_can_show_is_refused_before_the_first_update(code: ModuleType, mistake: Mistake) -> None:
    assert CONFIG.count(mistake.old) == 1
    assert_refused(run("train", CONFIG.replace(mistake.old, mistake.new)), mistake)
    assert_nothing_was_trained(code)


def test_a_config_that_is_not_there_is_refused(code: ModuleType) -> None:
    done = CliRunner().invoke(app, ["train", "nowhere.yaml"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "SL108" in done.stderr
    assert "nowhere.yaml" in done.stderr


def test_a_data_file_that_is_not_there_is_named_before_the_first_update(code: ModuleType) -> None:
    done = run("train", CONFIG.replace(SIZE, 'FromFile", args: {path: nowhere.txt}'))
    assert done.exit_code in (1, 2)
    assert "nowhere.txt" in done.stderr
    assert done.stdout == ""
    assert_nothing_was_trained(code)


def test_several_mistakes_are_shown_at_once(code: ModuleType) -> None:
    done = run("train", CONFIG.replace(LR, "lrr: 1e-3").replace(STEPS, "max_steps: 2.5").replace("size: 32", "sise: 3"))
    assert done.exit_code == 2
    for place in ("bad.yaml:8:23", "bad.yaml:1:29", "bad.yaml:5:"):
        assert place in done.stderr
    assert_nothing_was_trained(code)


def test_without_a_mistake_it_trains(code: ModuleType) -> None:
    assert run("check", CONFIG).exit_code == 0
    assert_nothing_was_trained(code)
    assert run("train", CONFIG).exit_code == 0
    (net, state), *_ = reversed(code.BUILT)
    assert not torch.equal(net.head.weight, state["head.weight"])
    assert Path("runs/bad/model.safetensors").is_file()
