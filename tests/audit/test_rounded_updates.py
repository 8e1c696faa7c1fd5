"""Weights of half precision whose updates round away, beside training in half precision that works."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler


def net(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 3)).to(dtype)


def loss_of(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return F.cross_entropy(model(torch.randn(16, 32, dtype=dtype)).float(), torch.randint(0, 3, (16,)))


def faults_of(watched: Any, model: nn.Module, optimizer: Any, times: int = 18, after: Any = None) -> list[Any]:
    with watched(model, optimizer) as audit:
        for _ in range(times):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            if after is not None:
                after()
            audit.step()
    return list(audit.faults)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sgd_on_weights_that_are_far_from_zero(dtype: torch.dtype, watched: Any) -> None:
    model = nn.ModuleDict({"table": nn.Embedding(300, 16), "head": nn.Linear(16, 2)}).to(dtype)
    with torch.no_grad():
        model["table"].weight.normal_(3.0, 0.5)
    optimizer = SGD(model.parameters(), lr=2e-3 if dtype is torch.bfloat16 else 2e-4)
    with watched(model, optimizer) as audit:
        for _ in range(14):
            optimizer.zero_grad()
            out = model["head"](model["table"](torch.randint(0, 300, (64,)))).float()
            F.cross_entropy(out, torch.randint(0, 2, (64,))).backward()
            optimizer.step()
            audit.step()
    found = [fault for fault in audit.faults if fault.code == "SL674"]
    assert len(found) == 1
    assert "table.weight" in found[0].names
    assert "optimizer.step()" in found[0].where


def test_a_fine_tuning_rate(watched: Any) -> None:
    model = net()
    faults = faults_of(watched, model, AdamW(model.parameters(), lr=1e-5, foreach=False))
    assert [fault.code for fault in faults] == ["SL674"]
    assert "1.weight" in faults[0].names


@pytest.mark.parametrize("rate", [1e-3, 3e-4])
def test_a_rate_that_moves_most_weights(rate: float, watched: Any) -> None:
    model = net()
    assert faults_of(watched, model, AdamW(model.parameters(), lr=rate)) == []


def test_a_warm_up_and_the_end_of_a_decay(watched: Any) -> None:
    model = net()
    optimizer = AdamW(model.parameters(), lr=2e-3)
    warm = lr_scheduler.LinearLR(optimizer, 1e-4, 1.0, total_iters=400)
    assert faults_of(watched, model, optimizer, after=warm.step) == []
    model = net()
    optimizer = AdamW(model.parameters(), lr=2e-3)
    decay = lr_scheduler.ExponentialLR(optimizer, 0.4)
    assert faults_of(watched, model, optimizer, after=decay.step) == []


def test_stochastic_rounding(watched: Any) -> None:
    class Rounding(Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 1e-3})

        @torch.no_grad()
        def step(self) -> None:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                exact = p.float() - self.param_groups[0]["lr"] * p.grad.float()
                noise = torch.randint_like(exact, 0, 1 << 16, dtype=torch.int32)
                p.copy_(((exact.view(torch.int32) + noise) & -65536).view(torch.float32))

    model = net()
    assert faults_of(watched, model, Rounding(model.parameters())) == []


def test_copies_of_the_weights_in_float32(watched: Any) -> None:
    model = net()
    master = copy.deepcopy(model).float()
    optimizer = AdamW(master.parameters(), lr=1e-5)
    with watched({"model": model, "master": master}, optimizer) as audit:
        for _ in range(14):
            model.zero_grad()
            loss_of(model).backward()
            for p, q in zip(master.parameters(), model.parameters(), strict=True):
                assert q.grad is not None
                p.grad = q.grad.float()
            optimizer.step()
            with torch.no_grad():
                for p, q in zip(master.parameters(), model.parameters(), strict=True):
                    q.copy_(p)
            audit.step()
    assert "SL674" not in [fault.code for fault in audit.faults]


def test_rows_that_no_batch_has_used_and_weights_that_are_pruned(watched: Any) -> None:
    model = nn.ModuleDict({"table": nn.Embedding(500, 16), "head": nn.Linear(16, 2)}).bfloat16()
    with torch.no_grad():
        model["table"].weight[:, 1:].zero_()
    keep = (model["table"].weight != 0).to(torch.bfloat16)
    optimizer = AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    with watched(model, optimizer) as audit:
        for _ in range(14):
            optimizer.zero_grad()
            out = model["head"](model["table"](torch.randint(0, 9, (16,)))).float()
            F.cross_entropy(out, torch.randint(0, 2, (16,))).backward()
            optimizer.step()
            with torch.no_grad():
                model["table"].weight.mul_(keep)
            audit.step()
    assert [fault.code for fault in audit.faults] == []
