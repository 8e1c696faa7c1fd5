"""Moving averages that go backwards, beside correct programs that write one network into another."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam

Update = Callable[[nn.Module, nn.Module, int, list[Any]], None]
BACKWARDS: dict[str, tuple[str, Update]] = {}
RIGHT: dict[str, tuple[str, Update]] = {}


def backwards(other: str) -> Callable[[Update], Update]:
    """Add an update that writes the network of this name into the one that trains."""

    def add(update: Update) -> Update:
        BACKWARDS[update.__name__] = other, update
        return update

    return add


def right(other: str) -> Callable[[Update], Update]:
    """Add one that is correct."""

    def add(update: Update) -> Update:
        RIGHT[update.__name__] = other, update
        return update

    return add


def run(other: str, update: Update, watched: Any) -> list[Any]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    twin = copy.deepcopy(net).requires_grad_(False)
    optimizer = Adam(net.parameters(), lr=0.01) if other == "ema" else SGD(net.parameters(), lr=0.05)
    memory: list[Any] = []
    with watched({"net": net, other: twin}, optimizer) as audit:
        for i in range(24):
            x, y = torch.randn(16, 4), torch.randint(0, 3, (16,))
            with torch.no_grad():
                soft = twin(x).softmax(1)
            out = net(x + 0.1 * torch.randn_like(x))
            optimizer.zero_grad()
            (F.cross_entropy(out, y) + F.kl_div(out.log_softmax(1), soft, reduction="batchmean")).backward()
            optimizer.step()
            update(net, twin, i, memory)
            audit.step()
    return list(audit.faults)


@pytest.mark.parametrize("name", BACKWARDS)
def test_an_average_that_goes_backwards_is_named(name: str, watched: Any) -> None:
    other, update = BACKWARDS[name]
    faults = run(other, update, watched)
    assert [fault.code for fault in faults] == ["SL673"]
    assert f"{other}.0.weight" in faults[0].names
    assert name in faults[0].where


@pytest.mark.parametrize("name", RIGHT)
def test_other_writes_are_not(name: str, watched: Any) -> None:
    other, update = RIGHT[name]
    assert "SL673" not in [fault.code for fault in run(other, update, watched)]


@backwards("key_encoder")
def as_in_momentum_contrast(net: nn.Module, twin: nn.Module, i: int, memory: list[Any]) -> None:
    for k, q in zip(twin.parameters(), net.parameters(), strict=True):
        q.data = q.data * 0.99 + k.data * (1.0 - 0.99)


@backwards("teacher")
@torch.no_grad()
def by_interpolation(net: nn.Module, twin: nn.Module, i: int, memory: list[Any]) -> None:
    for t, s in zip(twin.parameters(), net.parameters(), strict=True):
        s.lerp_(t, 0.01)


@backwards("ema")
@torch.no_grad()
def all_at_once(net: nn.Module, twin: nn.Module, i: int, memory: list[Any]) -> None:
    mine, theirs = list(net.parameters()), list(twin.parameters())
    torch._foreach_mul_(mine, 0.99)
    torch._foreach_add_(mine, theirs, alpha=0.01)


@backwards("critic_target")
def with_polyak_the_wrong_way(net: nn.Module, twin: nn.Module, i: int, memory: list[Any]) -> None:
    for p, target in zip(net.parameters(), twin.parameters(), strict=True):
        p.data.copy_(0.005 * target.data + 0.995 * p.data)


@right("target")
@torch.no_grad()
def the_target_follows(net: nn.Module, twin: nn.Module, i: int, memory: list[Any]) -> None:
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        q.mul_(0.99).add_(p, alpha=0.01)


@right("target")
def hard_copies_now_and_then(net: nn.Module, twin: nn.Module, i: int, memory: list[Any]) -> None:
    if i % 7 == 6:
        twin.load_state_dict(net.state_dict())


@right("slow")
@torch.no_grad()
def lookahead(net: nn.Module, twin: nn.Module, i: int, memory: list[Any]) -> None:
    if i % 2:
        for fast, slow in zip(net.parameters(), twin.parameters(), strict=True):
            slow.lerp_(fast, 0.5)
            fast.copy_(slow)


@right("ema")
@torch.no_grad()
def swapped_for_evaluation_and_back(net: nn.Module, twin: nn.Module, i: int, memory: list[Any]) -> None:
    for p, average in zip(net.parameters(), twin.parameters(), strict=True):
        average.lerp_(p, 0.1)
    kept = [p.clone() for p in net.parameters()]
    for p, average in zip(net.parameters(), twin.parameters(), strict=True):
        p.copy_(average)
    net.eval()
    memory.append(net(torch.randn(4, 4)).sum().item())
    net.train()
    for p, old in zip(net.parameters(), kept, strict=True):
        p.copy_(old)


@right("pretrained")
@torch.no_grad()
def decay_towards_the_start(net: nn.Module, twin: nn.Module, i: int, memory: list[Any]) -> None:
    for p, start in zip(net.parameters(), twin.parameters(), strict=True):
        p.add_(start - p, alpha=0.01)


@right("teacher")
@torch.no_grad()
def each_follows_the_other(net: nn.Module, twin: nn.Module, i: int, memory: list[Any]) -> None:
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        q.lerp_(p, 0.05)
        p.lerp_(q, 0.05)


@right("teacher")
@torch.no_grad()
def a_frozen_teacher_beside_clipped_weights(net: nn.Module, twin: nn.Module, i: int, memory: list[Any]) -> None:
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        memory.append((p - q).norm().item())
        p.clamp_(-3, 3).mul_(0.999)
