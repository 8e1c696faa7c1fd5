"""Watching never changes training: the same bits of every weight, buffer and random state at every level."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import safeloop as sl


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * g * x**2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3))
        self.b = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2), nn.Tanh())
        self.dead, self.head = nn.Linear(6, 8), nn.Linear(8, 1)
        nn.init.constant_(self.dead.bias, -100.0)

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.b, self.a(x), use_reentrant=False) + 0.1 * self.dead(x).relu()
        return self.head(Cube.apply(F.dropout(h, 0.1, self.training)))


class Plain(sl.Trainer):
    def losses(self, batch: Tensor) -> dict[str, Tensor]:
        out = self.model(batch).float()
        return {"fit": F.mse_loss(out, batch[:, :1]), "spread": 0.1 * out.var() * (1 + torch.rand(()))}

    def metrics(self, batch: Tensor) -> dict[str, Tensor]:
        return {"error": (self.model(batch) - batch[:, :1]).abs().squeeze(1)}


class Phases(sl.Trainer):
    @sl.phase(trains="critic", repeat=2)
    def critic_phase(self, real: Tensor) -> dict[str, Tensor]:
        fake = self.model.generator(torch.randn(len(real), 6))
        return {"gap": self.model.critic(fake).mean() - self.model.critic(real).mean()}

    @sl.phase(trains="generator")
    def generator_phase(self, real: Tensor) -> dict[str, Tensor]:
        return {"adversarial": -self.model.critic(self.model.generator(torch.randn(len(real), 6))).mean()}


class Nets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6))
        self.critic = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.LeakyReLU(), nn.Linear(8, 1))


def run_plain(folder: Path, level: str, **options: Any) -> nn.Module:
    data = [torch.randn(8, 6, generator=torch.Generator().manual_seed(i)) for i in range(12)]
    settings = {"dir": str(folder), "max_steps": 26, "device": "cpu"} | options.pop("run", {})
    trainer = Plain(
        model=Net(), data=data, eval_data=data[:2], evaluate={"every": 4}, optimizers={"type": "Adam", "lr": 1e-2},
        run=settings, audit={"level": level}, log={"sinks": []}, **options,
    )  # fmt: skip
    trainer.fit()
    return trainer.model


def run_phases(folder: Path, level: str, **options: Any) -> nn.Module:
    data = [torch.randn(8, 6, generator=torch.Generator().manual_seed(i)) for i in range(12)]
    critic = {"type": "Adam", "lr": 1e-3, "params": ["critic.*"]}
    trainer = Phases(
        model=Nets(), data=data, optimizers={"critic": critic, "generator": critic | {"params": "rest"}},
        run={"dir": str(folder), "max_steps": 22, "device": "cpu"}, audit={"level": level}, log={"sinks": []},
    )  # fmt: skip
    trainer.fit()
    return trainer.model


RUNS = {
    "dropout": (run_plain, {}),
    "accumulation": (run_plain, {"accumulate": {"micro_batches": 2}}),
    "bf16": (run_plain, {"run": {"precision": "bf16"}}),
    "phases": (run_phases, {}),
}


def outcome(name: str, folder: Path, level: str) -> tuple[list[Tensor], list[Any]]:
    run, options = RUNS[name]
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = run(folder / level, level, **options)
    return list(model.state_dict().values()), [torch.get_rng_state().tolist(), random.getstate(), np.random.rand()]


@pytest.mark.parametrize("name", RUNS)
def test_every_level_ends_in_the_same_bits(name: str, tmp_path: Path) -> None:
    weights, states = outcome(name, tmp_path, "off")
    assert any(w.abs().sum() > 0 for w in weights)
    for level in ("standard", "full"):
        others, theirs = outcome(name, tmp_path, level)
        assert all(map(torch.equal, weights, others))
        assert states == theirs


@pytest.mark.parametrize("level", ["standard", "full"])
def test_an_audited_loop_ends_in_the_same_bits(level: str) -> None:
    def loop(level: str) -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        with sl.audit(model=model, optimizers=optimizer, level=level, on_fault="collect") as audit:
            for _ in range(26):
                x = torch.randn(8, 6)
                optimizer.zero_grad()
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = F.mse_loss(model(x).float(), x[:, :1])
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                audit.step()
        return list(model.state_dict().values()), torch.get_rng_state()

    weights, state = loop("off")
    others, theirs = loop(level)
    assert all(map(torch.equal, weights, others))
    assert torch.equal(state, theirs)
