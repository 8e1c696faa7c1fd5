"""Clips of sums that are not complete, beside what looks like them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm
from torch.optim import SGD, Adam


def net(last: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, last))


def loss_of(model: nn.Module) -> Tensor:
    return F.mse_loss(model(torch.randn(6, 4)), torch.randn(6, 1))


def codes(audit: Any) -> list[str]:
    return [fault.code for fault in audit.faults]


def test_a_window_of_two_in_an_inner_loop(watched: Any) -> None:
    model = net()
    optimizer = Adam(model.parameters(), lr=1e-2)
    with watched(model, optimizer) as audit:
        for _ in range(4):
            optimizer.zero_grad()
            for _ in range(2):
                (loss_of(model) / 2).backward()
                clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
            audit.step()
    assert codes(audit) == ["SL676"]
    assert "clip_grad_norm_(model.parameters(), 0.01)" in audit.faults[0].where


def test_a_recurrent_loop_whose_trainer_clips_in_its_backward(watched: Any) -> None:
    class Loop:
        def __init__(self) -> None:
            self.rnn, self.head = nn.GRU(3, 8, batch_first=True), nn.Linear(8, 1)
            self.parts = nn.ModuleDict({"rnn": self.rnn, "head": self.head})
            self.optimizer = SGD(self.parts.parameters(), lr=0.1, momentum=0.9)

        def backward(self, loss: Tensor) -> None:
            loss.backward()
            norm = get_total_norm([p.grad for p in self.parts.parameters() if p.grad is not None])
            clip_grads_with_norm_(self.parts.parameters(), 0.01, norm)

        def one(self, i: int) -> None:
            out = self.head(self.rnn(torch.randn(5, 6, 3))[0][:, -1])
            self.backward((out - 1).square().mean() / 8)
            if (i + 1) % 8 == 0:
                self.optimizer.step()
                self.parts.zero_grad()

    loop = Loop()
    with watched(loop.parts, loop.optimizer) as audit:
        for i in range(16):
            loop.one(i)
            audit.step()
    assert codes(audit) == ["SL676"]


SOUND: list[Callable[[Any], Any]] = []


def sound(loop: Callable[[Any], Any]) -> Callable[[Any], Any]:
    SOUND.append(loop)
    return loop


@pytest.mark.parametrize("loop", SOUND, ids=lambda loop: loop.__name__)
def test_no_fault_of(loop: Callable[[Any], Any], watched: Any) -> None:
    assert codes(loop(watched)) == []


@sound
def samples_clipped_one_by_one_for_privacy(watched: Any) -> Any:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    with watched(model, optimizer) as audit:
        for _ in range(5):
            sums = [torch.zeros_like(p) for p in model.parameters()]
            for _ in range(4):
                optimizer.zero_grad()
                loss_of(model).backward()
                clip_grad_norm_(model.parameters(), 0.1)
                for total, p in zip(sums, model.parameters(), strict=True):
                    assert p.grad is not None
                    total += p.grad
            for total, p in zip(sums, model.parameters(), strict=True):
                p.grad = total / 4 + 0.01 * torch.randn_like(total)
            optimizer.step()
            audit.step()
    return audit


@sound
def a_norm_that_is_measured_after_each_micro_batch(watched: Any) -> Any:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    norms = []
    with watched(model, optimizer) as audit:
        for _ in range(5):
            for _ in range(4):
                (loss_of(model) / 4).backward()
                norms.append(float(clip_grad_norm_(model.parameters(), float("inf"))))
            clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            audit.step()
    return audit


@sound
def a_limit_that_is_never_reached(watched: Any) -> Any:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    with watched(model, optimizer) as audit:
        for _ in range(5):
            for _ in range(4):
                (loss_of(model) / 4).backward()
                clip_grad_norm_(model.parameters(), 100.0)
            optimizer.step()
            optimizer.zero_grad()
            audit.step()
    return audit


@sound
def a_part_that_is_stepped_more_rarely(watched: Any) -> Any:
    table, head = nn.Embedding(10, 4), nn.Linear(4, 1)
    models = nn.ModuleDict({"table": table, "head": head})
    slow, fast = SGD(table.parameters(), lr=0.1), SGD(head.parameters(), lr=0.1)
    with watched(models, {"slow": slow, "fast": fast}) as audit:
        for i in range(16):
            head(table(torch.randint(0, 10, (8,)))).square().mean().backward()
            clip_grad_norm_(models.parameters(), 0.1)
            fast.step()
            fast.zero_grad()
            if i % 4 == 3:
                slow.step()
                slow.zero_grad()
            audit.step()
    return audit


@sound
def two_networks_clipped_in_turn(watched: Any) -> Any:
    one, two = net(), net()
    optimizer = SGD([*one.parameters(), *two.parameters()], lr=0.1)
    with watched(nn.ModuleDict({"one": one, "two": two}), optimizer) as audit:
        for _ in range(5):
            optimizer.zero_grad()
            for model in (one, two):
                loss_of(model).backward()
                clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            audit.step()
    return audit


@sound
def a_regulariser_that_is_added_unclipped(watched: Any) -> Any:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    with watched(model, optimizer) as audit:
        for _ in range(5):
            optimizer.zero_grad()
            loss_of(model).backward()
            clip_grad_norm_(model.parameters(), 0.1)
            torch.stack([p.square().sum() for p in model.parameters()]).sum().mul(1e-3).backward()
            optimizer.step()
            audit.step()
    return audit
