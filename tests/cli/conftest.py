from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from safeloop.cli.main import app

CONFIG = """\
run: {name: digits, dir: runs, max_steps: 6, device: cpu}
model: {target: "torch.nn:Linear", args: [64, 10]}
data:
  train: {target: "safeloop.datasets:Digits", args: {split: train, flat: true}}
  eval: {target: "safeloop.datasets:Digits", args: {split: test, flat: true}}
  batch_size: 64
optimizers: {type: SGD, lr: 0.1}
losses:
  ce: {type: CrossEntropyLoss, inputs: [output, batch.1]}
metrics:
  accuracy: {target: "safeloop.metrics:Accuracy", inputs: [output, batch.1]}
log: {every: 2}
"""

USER_MODULE = """\
import safeloop as sl


class Breaks(sl.Trainer):
    def loss(self, batch):
        raise ValueError("the user's own mistake")


class Interrupts(sl.Trainer):
    def loss(self, batch):
        raise KeyboardInterrupt


class Computes(sl.Trainer):
    def loss(self, batch):
        return self.model(batch[0]).square().mean()
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of a user's, current: a config that needs no code of theirs, and a module that the config may name."""
    (tmp_path / "digits.yaml").write_text(CONFIG)
    (tmp_path / "cli_user_code.py").write_text(USER_MODULE)
    (tmp_path / "pyproject.toml").write_text('[tool.safeloop]\nallow_modules = ["cli_user_code"]\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("NO_COLOR", "1")
    yield tmp_path
    sys.modules.pop("cli_user_code", None)


@pytest.fixture
def config_with_trainer(project: Path) -> Callable[[str], str]:
    """Writes a config whose loss is that of a trainer class in the user's module; gives its name."""

    def write(name: str) -> str:
        lines = CONFIG[: CONFIG.index("losses:")]
        (project / f"{name}.yaml").write_text(f'{lines}trainer: {{target: "cli_user_code:{name}"}}\n')
        return f"{name}.yaml"

    return write


@pytest.fixture
def safeloop() -> Callable[..., Result]:
    """Runs the command line in this process."""
    return lambda *args: CliRunner().invoke(app, list(args))
