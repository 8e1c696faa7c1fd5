from __future__ import annotations

import pytest

from safeloop.config import ConfigError, load

VALID = """\
run: {name: digits, max_steps: 100}
model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
data:
  train: {target: "safeloop.datasets:Digits", args: {split: train, flat: true}}
  batch_size: 64
optimizers:
  main:
    type: AdamW
    lr: 1e-3
    betas: [0.9, 0.99]
    max_norm: 1.0
    scheduler: {type: CosineAnnealingLR, T_max: 100}
losses: {ce: {type: CrossEntropyLoss, inputs: [output, batch.1], weight: 2}}
"""


@pytest.fixture
def valid():
    """A config in which everything is right, as text."""
    return VALID


@pytest.fixture
def load_text(tmp_path, monkeypatch):
    """Loads a text as `config.yaml` of the current directory, without the process's environment."""
    monkeypatch.chdir(tmp_path)

    def load_it(text, **options):
        (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
        return load("config.yaml", **{"environment": {}, **options})

    return load_it


@pytest.fixture
def refused(load_text):
    """Loads a text that must be refused, and returns the error."""

    def refuse_it(text, **options):
        with pytest.raises(ConfigError) as caught:
            load_text(text, **options)
        return caught.value

    return refuse_it
