"""A default device of the user's (`torch.set_default_device`) is not the device of what safeloop makes for itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

import safeloop as sl


class Run(sl.Trainer):
    def losses(self, batch: Any) -> dict[str, Any]:
        x, y = batch
        return {"fit": (self.model(x) - y).square().mean(), "gp": self.penalty(self.model, at=x)}

    def metrics(self, batch: Any) -> dict[str, Any]:
        x, y = batch
        return {"error": (self.model(x) - y).abs().squeeze(1), "count": 1.0}


@pytest.fixture
def _elsewhere() -> Iterator[None]:
    torch.set_default_device("meta")  # where a tensor has no values: whatever lands here shows
    yield
    torch.set_default_device(None)


def trained(folder: Any) -> tuple[list[Tensor], dict[str, float]]:
    with torch.device("cpu"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        data = TensorDataset(torch.randn(40, 4), torch.randn(40, 1))
        part = Subset(data, list(range(32)))
    run = Run(
        model=model,
        data=part,
        eval_data=data,
        evaluate={"every": 5},
        optimizers={"type": "AdamW", "lr": 1e-2, "max_norm": 1.0},
        penalties={"gp": {"type": "gradient", "every": 2}},
        run={"max_steps": 30, "device": "cpu", "dir": str(folder), "seed": 1},
        log={"sinks": ["jsonl"], "every": 5},
    )
    result = run.fit()
    assert result.faults == ()
    return list(model.parameters()), dict(result.metrics)


def test_a_run_is_the_same_under_it(tmp_path: Any, request: pytest.FixtureRequest) -> None:
    weights, metrics = trained(tmp_path / "plain")
    request.getfixturevalue("_elsewhere")
    others, theirs = trained(tmp_path / "moved")
    assert all(map(torch.equal, weights, others))
    assert metrics == theirs
