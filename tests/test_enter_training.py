"""A run enters train mode by the model's own `train`, as any loop does."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import safeloop as sl
from safeloop.evaluation import enter_training


class Frozen(nn.Module):
    """Keeps its BatchNorm in eval mode, whatever mode it is in itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4).requires_grad_(False)
        self.dropout = nn.Dropout(0.5)

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


class Run(sl.Trainer):
    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        return self.model(batch).square().mean()


def test_a_run_leaves_a_norm_alone_that_its_module_keeps_in_eval_mode(tmp_path: Path) -> None:
    model = nn.Sequential(Frozen(), nn.Linear(4, 1))
    before = model[0].norm.running_mean.clone()
    sgd = {"type": "SGD", "lr": 0.1}
    trainer = Run(model=model, data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 6, "dir": str(tmp_path)})
    trainer.fit()
    assert trainer.faults == ()
    assert torch.equal(model[0].norm.running_mean, before)


def test_parts_in_eval_mode_stay_so() -> None:
    part = Frozen()
    part.dropout.eval()
    model = nn.Sequential(part, nn.Dropout().eval())
    enter_training(model)
    assert [m.training for m in (model, part, part.norm, part.dropout, model[1])] == [True, True, True, False, False]
    model.eval()
    enter_training(model)
    assert [m.training for m in (model, part, part.norm, part.dropout, model[1])] == [True, True, False, True, True]
