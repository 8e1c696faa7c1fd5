"""bf16 and fp16: autocast per forward, one gradient scale for all, true gradients for every reading."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import safeloop as sl
from safeloop.step.precision import GradientScale

OFF: dict[str, Any] = {"sinks": []}


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))


def batches(n: int = 8) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 4, generator=generator), torch.randint(3, (16,), generator=generator)) for _ in range(n)]


class Classify(sl.Trainer):
    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.model(x), y)


def train(net: nn.Module, data: list[Any], steps: int, precision: str, **sections: Any) -> sl.RunResult:
    spec = {"type": "SGD", "lr": 0.1, "momentum": 0.9, "max_norm": 0.5}
    run = {"max_steps": steps, "precision": precision}
    return Classify(model=net, data=data, optimizers=spec, run=run, log=OFF, **sections).fit()


def test_bf16_has_the_bits_of_autocast_around_each_forward() -> None:
    net = make_net()
    plain = copy.deepcopy(net)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, fused=True)
    for x, y in batches() * 2:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(plain(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
    train(net, batches(), 16, "bf16")
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), plain.parameters(), strict=True))


def test_fp16_has_the_bits_of_torchs_grad_scaler() -> None:
    net = make_net()
    plain = copy.deepcopy(net)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu")
    for x, y in batches() * 2:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(plain(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
    spec = {"type": "SGD", "lr": 0.1, "momentum": 0.9, "max_norm": 0.5, "fused": False}
    run = {"max_steps": 16, "precision": "fp16"}
    Classify(model=net, data=batches(), optimizers=spec, run=run, log=OFF).fit()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), plain.parameters(), strict=True))


def test_an_overflow_halves_the_scale_once_and_skips_every_owner_and_schedule() -> None:
    class Two(sl.Trainer):
        def losses(self, batch: Any) -> dict[str, Tensor]:
            x, _ = batch
            loud = self.model["a"](x).float().square().sum() * (1e6 if self.step == 1 else 1e-3)
            return {"a": loud, "b": self.model["b"](x).float().square().mean()}

    torch.manual_seed(0)
    net = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(4, 2)})
    schedule = {"type": "StepLR", "step_size": 1, "gamma": 0.5}
    optimizers = {
        "a": {"type": "SGD", "lr": 0.1, "params": ["a.*"], "scheduler": schedule},
        "b": {"type": "SGD", "lr": 0.1, "params": ["b.*"], "scheduler": schedule},
    }
    trainer = Two(model=net, data=batches(), optimizers=optimizers, run={"max_steps": 3, "precision": "fp16"}, log=OFF)
    trainer.fit()
    assembly = trainer._assembled()
    assert assembly.precision.scale is not None
    assert assembly.precision.scale.value.item() == 2.0**15
    rates = [owner.optimizer.param_groups[0]["lr"] for owner in assembly.owners.values()]
    assert rates == [0.1 * 0.25] * 2, "three steps, one of them skipped: two moves of the schedule"


def test_a_scale_that_never_recovers_is_a_fault() -> None:
    class Broken(sl.Trainer):
        def loss(self, batch: Any) -> Tensor:
            return self.model(batch[0]).mean() / 0.0 * 0.0

    with pytest.raises(sl.FaultError, match="SL602"):
        Broken(
            model=make_net(),
            data=batches(),
            optimizers={"type": "SGD", "lr": 0.1},
            run={"max_steps": 100, "precision": "fp16"},
            log=OFF,
        ).fit()


def test_unscale_gives_back_what_was_scaled_and_one_adapt_serves_many_turns() -> None:
    scale = GradientScale(torch.device("cpu"), initial=8.0)
    seeds = scale.scaled([torch.tensor(3.0)])
    assert seeds[0].item() == 24.0
    good, bad = [torch.tensor([8.0, 16.0])], [torch.tensor([torch.inf])]
    scale.unscale(good)
    assert good[0].tolist() == [1.0, 2.0]
    scale.unscale(bad)
    scale.adapt()
    scale.adapt()
    assert scale.value.item() == 4.0
