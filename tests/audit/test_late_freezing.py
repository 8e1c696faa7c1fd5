"""Freezing without effect that somebody tries while the loop runs, beside what works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam

import safeloop as sl


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


Act = Callable[[Net, int], Any]


def run(watched: Any, act: Act, steps: int = 16, model: Net | None = None) -> list[Any]:
    model = model or Net()
    optimizer = Adam(model.parameters(), lr=1e-2)
    with watched(model, optimizer) as audit:
        for i in range(steps):
            act(model, i)
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(6, 4)), torch.randn(6, 1)).backward()
            optimizer.step()
            audit.step()
    return [(fault.code, fault.names) for fault in audit.faults]


def test_a_module_by_a_dead_attribute(watched: Any) -> None:
    def act(model: Net, i: int) -> None:
        if i == 5:
            model.body.requires_grad = False  # type: ignore[assignment]

    assert run(watched, act) == [("SL210", ("body", "body.0.weight", "body.0.bias"))]


def test_parameters_by_a_misspelling(watched: Any) -> None:
    def act(model: Net, i: int) -> None:
        for p in model.head.parameters() if i == 8 else ():
            p.require_grad = False  # type: ignore[attr-defined]

    assert run(watched, act) == [("SL210", ("head.weight", "head.bias"))]


def test_thawing_by_a_dead_attribute(watched: Any) -> None:
    model = Net()
    model.body.requires_grad_(False)

    def act(model: Net, i: int) -> None:
        if i == 4:
            model.body.requires_grad = True  # type: ignore[assignment]

    assert run(watched, act, model=model) == [("SL210", ("body", "body.0.weight", "body.0.bias"))]


def test_late_in_a_trainer() -> None:
    class Run(sl.Trainer):
        def loss(self, batch: Tensor) -> Tensor:
            if self.step == 5:
                self.model.body.requires_grad = False
            return self.model(batch).square().mean()

    data = [torch.randn(8, 4) for _ in range(16)]
    trainer = Run(model=Net(), data=data, optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 16})
    trainer.fit()
    assert [fault.code for fault in trainer.faults] == ["SL210"]


def _really(model: Net, i: int) -> None:
    if i == 12:
        model.body.requires_grad_(False)
        model.body.requires_grad = False  # type: ignore[assignment]
        for p in model.body.parameters():
            p.grad = None


def _and_back_without_the_attribute(model: Net, i: int) -> None:
    if i == 4:
        model.body.requires_grad = False  # type: ignore[assignment]
    if i in (4, 10):
        for p in model.body.parameters():
            p.requires_grad = i == 10


def _behind_the_training(model: Net, i: int) -> None:
    if i == 15:
        model.requires_grad = False  # type: ignore[assignment]


@pytest.mark.parametrize("act", [_really, _and_back_without_the_attribute, _behind_the_training])
def test_no_fault_of(act: Act, watched: Any) -> None:
    assert run(watched, act) == []


def test_a_switch_of_the_class_itself(watched: Any) -> None:
    class Gate(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.requires_grad = x.requires_grad  # type: ignore[assignment]
            return super().forward(x)

    assert run(watched, lambda model, i: None, model=Gate()) == []


def test_a_discriminator_that_is_frozen_for_the_generator(watched: Any) -> None:
    torch.manual_seed(0)
    nets = nn.ModuleDict({"G": nn.Linear(3, 4), "D": nn.Linear(4, 1)})
    opt_g, opt_d = SGD(nets["G"].parameters(), lr=0.1), SGD(nets["D"].parameters(), lr=0.1)

    def switch(*, on: bool) -> None:
        nets["D"].requires_grad = on  # type: ignore[assignment]
        for p in nets["D"].parameters():
            p.requires_grad = on

    with watched(nets, {"g": opt_g, "d": opt_d}) as audit:
        for _ in range(14):
            switch(on=True)
            opt_d.zero_grad()
            fake = nets["G"](torch.randn(8, 3))
            (F.softplus(nets["D"](fake.detach())) + F.softplus(-nets["D"](torch.randn(8, 4) + 1))).mean().backward()
            opt_d.step()
            switch(on=False)
            opt_g.zero_grad()
            F.softplus(-nets["D"](fake)).mean().backward()
            opt_g.step()
            audit.step()
    assert audit.faults == ()
