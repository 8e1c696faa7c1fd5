"""Every optimizer of torch that has no closure, ten steps in a Trainer against ten in a plain loop: the same bits."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import safeloop as sl
from safeloop.optim.specs import OPTIMIZERS

OFF: dict[str, Any] = {"sinks": []}
STEPS = 10
ELSEWHERE = {"LBFGS", "SparseAdam"}
"""LBFGS computes the loss inside its update; SparseAdam takes sparse gradients only."""
ARGUMENTS: dict[str, dict[str, Any]] = {
    "ASGD": {"lr": 0.05, "t0": 3.0},
    "Adafactor": {"lr": 0.05, "weight_decay": 0.01},
    "Adamax": {"lr": 0.05, "weight_decay": 0.01},
    "RMSprop": {"lr": 0.01, "momentum": 0.9, "centered": True},
    "Rprop": {"lr": 0.01},
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
}
FUSED = {"Adagrad", "Adam", "AdamW", "SGD"}


class Conv(nn.Module):
    """Parameters with one, two and four dimensions, one of which takes part only in every second step."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.side = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(12, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        hidden = self.conv(x.reshape(-1, 1, 4, 4)).tanh()
        return self.head(hidden.flatten(1)) * (self.side if self.calls % 2 else 1.0)


def matrices() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False))


def make_net(name: str) -> nn.Module:
    torch.manual_seed(0)
    return matrices() if name == "Muon" else Conv()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 16, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(STEPS)
    ]


class Classify(sl.Trainer):
    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.model(x), y)


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - ELSEWHERE))
def test_ten_steps_have_the_bits_of_the_plain_loop(name: str, clip: float | None) -> None:
    given = ARGUMENTS.get(name, {})
    net, plain = make_net(name), make_net(name)
    options = {**given, "fused": True} if name in FUSED else given
    optimizer = getattr(torch.optim, name)(plain.parameters(), **options)
    for x, y in batches():
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(plain.parameters(), clip)
        optimizer.step()
    spec = {"type": name, **given, "max_norm": clip}
    Classify(model=net, data=batches(), optimizers=spec, run={"max_steps": STEPS}, log=OFF).fit()
    before = dict(make_net(name).named_parameters())
    for (full, ours), theirs in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs), full
        assert not torch.equal(ours, before[full]), f"{full} must move"


def test_where_torch_has_a_fused_kernel_it_is_used() -> None:
    chosen = set()
    for name in set(OPTIMIZERS) - ELSEWHERE:
        run = {"max_steps": 1}
        trainer = Classify(model=make_net(name), data=batches(), optimizers={"type": name}, run=run, log=OFF)
        chosen |= {name} if trainer._assembled().owners["main"].is_fused else set()
    assert chosen == FUSED


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 4, sparse=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.words(x).mean(1))


@pytest.mark.parametrize("clip", [None, 0.1])
def test_sparse_adam_beside_adam_has_the_bits_of_the_plain_loop(clip: float | None) -> None:
    generator = torch.Generator().manual_seed(2)
    data = [
        (torch.randint(20, (8, 5), generator=generator), torch.randint(3, (8,), generator=generator))
        for _ in range(STEPS)
    ]
    torch.manual_seed(0)
    net = Bag()
    torch.manual_seed(0)
    plain = Bag()
    sparse = torch.optim.SparseAdam(plain.words.parameters(), lr=0.05)
    dense = torch.optim.Adam(plain.head.parameters(), lr=0.01, fused=True)
    for x, y in data:
        sparse.zero_grad()
        dense.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        if clip is not None:
            gradient = plain.words.weight.grad.coalesce()
            norm = torch.linalg.vector_norm(gradient.values())
            plain.words.weight.grad = gradient * torch.clamp(clip / (norm + 1e-6), max=1.0)
        sparse.step()
        dense.step()
    optimizers = {
        "words": {"type": "SparseAdam", "lr": 0.05, "params": ["words.*"], "max_norm": clip},
        "head": {"type": "Adam", "lr": 0.01, "params": "rest"},
    }
    Classify(model=net, data=data, optimizers=optimizers, run={"max_steps": STEPS}, log=OFF).fit()
    for (full, ours), theirs in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs), full


class Spectral(nn.Module):
    """A layer with complex weights before one with real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 8, dtype=torch.complex64))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x.to(torch.complex64) @ self.weight).abs())


@pytest.mark.parametrize("name", sorted(FUSED))
def test_complex_parameters_train_without_the_fused_kernel(name: str) -> None:
    torch.manual_seed(0)
    net = Spectral()
    torch.manual_seed(0)
    plain = Spectral()
    optimizer = getattr(torch.optim, name)(plain.parameters(), lr=0.01)
    for x, y in batches():
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    run = {"max_steps": STEPS}
    Classify(model=net, data=batches(), optimizers={"type": name, "lr": 0.01}, run=run, log=OFF).fit()
    assert all(map(torch.equal, net.parameters(), plain.parameters()))


def test_a_fused_kernel_that_only_the_first_update_would_refuse_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.11 does with Adagrad on CUDA."""

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("`fused=True` requires all the params to be on supported devices")

    monkeypatch.setattr(sys.modules[torch.optim.Adagrad.__module__], "_device_dtype_check_for_fused", refuse)
    net = make_net("Adagrad")
    trainer = Classify(model=net, data=batches(), optimizers={"type": "Adagrad"}, run={"max_steps": 2}, log=OFF)
    trainer.fit()
    assert not trainer._assembled().owners["main"].is_fused
