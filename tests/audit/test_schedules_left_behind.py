"""Schedules of an optimizer that another one has replaced, beside schedules that do their work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torch.optim import lr_scheduler as schedules


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def loss_of(model: nn.Module) -> Tensor:
    return F.mse_loss(model(torch.randn(6, 4)), torch.randn(6, 1))


def step(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()


def codes(audit: Any) -> list[str]:
    return [fault.code for fault in audit.faults]


def test_an_optimizer_that_is_built_again_in_the_middle(watched: Any) -> None:
    model = net()
    optimizer = Adam(model[2].parameters(), lr=0.01)
    schedule = schedules.CosineAnnealingLR(optimizer, T_max=40)
    with watched(model, optimizer) as audit:
        for i in range(18):
            if i == 6:
                optimizer = Adam(model.parameters(), lr=0.01)
            step(model, optimizer)
            schedule.step()
            audit.step()
    assert "SL646" in codes(audit)
    fault = next(fault for fault in audit.faults if fault.code == "SL646")
    assert "optimizer.step()" in fault.where
    assert "`main`" in fault.what


def test_a_factory_called_in_each_epoch(watched: Any) -> None:
    class Fit:
        def __init__(self) -> None:
            self.net = net()
            self.optimizer = self.make()
            self.schedule = schedules.ExponentialLR(self.optimizer, 0.5)

        def make(self) -> Optimizer:
            return AdamW(self.net.parameters(), lr=0.01)

    fit = Fit()
    with watched(fit.net, fit.optimizer) as audit:
        for epoch in range(6):
            if epoch:
                fit.optimizer = fit.make()
            for _ in range(3):
                step(fit.net, fit.optimizer)
                audit.step()
            fit.schedule.step()
    assert codes(audit) == ["SL646"]


def test_a_second_phase_with_the_schedule_of_the_first(watched: Any) -> None:
    model = net()
    model[0].requires_grad_(False)
    first = SGD(model[2].parameters(), lr=0.1, momentum=0.9)
    schedule = schedules.StepLR(first, 2, 0.5)
    with watched(model, first) as audit:
        for _ in range(6):
            step(model, first)
            schedule.step()
            audit.step()
    assert codes(audit) == []
    model[0].requires_grad_(True)
    second = SGD(model.parameters(), lr=0.1, momentum=0.9)
    with watched(model, second) as audit:
        for _ in range(10):
            step(model, second)
            schedule.step()
            audit.step()
    assert codes(audit) == ["SL646"]


SOUND: list[Callable[[Any], Any]] = []


def sound(loop: Callable[[Any], Any]) -> Callable[[Any], Any]:
    SOUND.append(loop)
    return loop


@pytest.mark.parametrize("loop", SOUND, ids=lambda loop: loop.__name__)
def test_no_fault_of(loop: Callable[[Any], Any], watched: Any) -> None:
    assert codes(loop(watched)) == []


@sound
def a_new_optimizer_with_its_own_schedule(watched: Any) -> Any:
    model = net()
    optimizer = Adam(model.parameters(), lr=0.01)
    schedule: Any = schedules.ExponentialLR(optimizer, 0.9)
    with watched(model, optimizer) as audit:
        for i in range(18):
            if i == 8:
                optimizer = Adam(model.parameters(), lr=0.001)
                schedule = schedules.ExponentialLR(optimizer, 0.9)
            step(model, optimizer)
            schedule.step()
            audit.step()
    return audit


@sound
def all_schedules_moved_whichever_optimizer_steps(watched: Any) -> Any:
    model = net()
    one, two = Adam(model.parameters(), lr=0.01), Adam(model.parameters(), lr=0.001)
    both = [schedules.ExponentialLR(one, 0.9), schedules.ExponentialLR(two, 0.9)]
    step(model, two)
    with watched(model, one) as audit:
        for i in range(18):
            step(model, one if i < 8 else two)
            for schedule in both:
                schedule.step()
            audit.step()
    return audit


@sound
def the_rate_of_the_schedule_handed_on_by_hand(watched: Any) -> Any:
    model = net()
    first = optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = schedules.ExponentialLR(first, 0.8)
    with watched(model, optimizer) as audit:
        for epoch in range(6):
            if epoch:
                optimizer = SGD(model.parameters(), lr=schedule.get_last_lr()[0], momentum=0.9)
            for _ in range(3):
                step(model, optimizer)
                audit.step()
            schedule.step()
    return audit


@sound
def a_wrapper_that_steps_its_base(watched: Any) -> Any:
    class Sharp(Optimizer):
        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(params, {"lr": lr})
            self.base = SGD(self.param_groups, lr=lr, momentum=0.9)
            self.param_groups = self.base.param_groups

        def step(self, closure: Any = None) -> None:
            """Two forwards and backwards."""

        def second_step(self) -> None:
            self.base.step()

    model = net()
    optimizer = Sharp(model.parameters(), 0.1)
    schedule = schedules.ExponentialLR(optimizer, 0.9)
    optimizer.step()  # quiets the warning of PyTorch
    with watched(model, optimizer) as audit:
        for _ in range(14):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.second_step()
            schedule.step()
            audit.step()
    return audit


@sound
def a_fine_search_behind_the_schedule(watched: Any) -> Any:
    model = net()
    adam = Adam(model.parameters(), lr=0.01)
    schedule = schedules.ExponentialLR(adam, 0.9)
    x, y = torch.randn(16, 4), torch.randn(16, 1)
    lbfgs = LBFGS(model.parameters(), lr=0.5, max_iter=3)

    def closure() -> Tensor:
        lbfgs.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    with watched(model, adam) as audit:
        for i in range(16):
            if i < 8:
                step(model, adam)
            else:
                lbfgs.step(closure)
            schedule.step()
            audit.step()
    return audit


@sound
def parts_that_take_turns(watched: Any) -> Any:
    model = net()
    one, two = Adam(model[0].parameters(), lr=0.01), Adam(model[2].parameters(), lr=0.01)
    both = [schedules.ExponentialLR(one, 0.9), schedules.ExponentialLR(two, 0.9)]
    with watched(model, {"one": one, "two": two}) as audit:
        for i in range(18):
            turn = i // 6 % 2
            step(model, (one, two)[turn])
            both[turn].step()
            audit.step()
    return audit
