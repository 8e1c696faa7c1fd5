"""On CUDA the Trainer and a plain loop end in the same bits, and a watched run in those of an unwatched one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import safeloop as sl

pytestmark = pytest.mark.cuda
STEPS = 60
Batch = tuple[Tensor, Tensor]


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
    """Dropout, statistics, a recomputed part and a function of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2))
        self.middle = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.2), nn.Tanh())
        self.head, self.decoder = nn.Linear(16, 3), nn.Linear(16, 6)

    def features(self, x: Tensor) -> Tensor:
        return Cube.apply(checkpoint(self.middle, self.body(x), use_reentrant=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def make_net() -> Net:
    torch.manual_seed(0)
    return Net().cuda()


def batches(count: int = 10) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(32, 6, generator=generator) for _ in range(count)]
    return [(x.cuda(), x[:, :3].argmax(1).cuda()) for x in inputs]


def endless() -> Iterator[Batch]:
    while True:
        yield from batches()


class Classify(sl.Trainer):
    def loss(self, batch: Batch) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.model(x), y)


class TwoTerms(sl.Trainer):
    def losses(self, batch: Batch) -> dict[str, Tensor]:
        x, y = batch
        z = self.model.features(x)
        return {"class": F.cross_entropy(self.model.head(z), y), "again": F.mse_loss(self.model.decoder(z), x)}


def train(kind: type[sl.Trainer], **sections: Any) -> Net:
    net = make_net()
    params = ["body.*", "middle.*", "head.*"] if kind is Classify else ["*"]
    frozen = {"frozen": ["decoder.*"]} if kind is Classify else {}
    run = {"max_steps": STEPS, "seed": 7, "device": "cuda"} | sections.pop("run", {})
    spec = {"type": "AdamW", "lr": 1e-2, "params": params} | sections.pop("optimizers", {})
    kind(model=net, data=batches(), optimizers=spec, run=run, log={"sinks": []}, **frozen, **sections).fit()
    return net


def plain(loss_of: Callable[[Net, Batch], Tensor], *, clip: float = 0.0, window: int = 1, bf16: bool = False) -> Net:
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True)
    torch.manual_seed(7)
    data = endless()
    for _ in range(STEPS):
        optimizer.zero_grad()
        for _ in range(window):
            with torch.autocast("cuda", dtype=torch.bfloat16) if bf16 else nullcontext():
                loss = loss_of(net, next(data))
            (loss / window).backward()
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
    return net


def assert_same(ours: nn.Module, other: nn.Module) -> None:
    expected = other.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def class_loss(net: Net, batch: Batch) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "clipped": ({"optimizers": {"max_norm": 0.5}}, {"clip": 0.5}),
    "accumulated": ({"accumulate": {"micro_batches": 2}}, {"window": 2}),
    "bf16": ({"run": {"precision": "bf16"}}, {"bf16": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_one_loss_has_the_bits_of_the_plain_loop(name: str) -> None:
    sections, options = CASES[name]
    assert_same(train(Classify, **copy.deepcopy(sections)), plain(class_loss, **options))


SECTIONS: dict[str, dict[str, Any]] = {
    "two terms": {},
    "accumulated": {"accumulate": {"micro_batches": 2}},
    "clipped": {"optimizers": {"max_norm": 0.5}},
    "bf16": {"run": {"precision": "bf16"}},
    "fp16": {"run": {"precision": "fp16"}},
}


@pytest.mark.parametrize("name", SECTIONS)
def test_every_level_of_the_audit_ends_in_the_same_bits(name: str) -> None:
    runs = []
    for level in ("off", "standard", "full"):
        net = train(TwoTerms, audit={"level": level}, **copy.deepcopy(SECTIONS[name]))
        runs.append((net, torch.get_rng_state(), torch.cuda.get_rng_state()))
    for net, cpu, cuda in runs[1:]:
        assert_same(net, runs[0][0])
        assert torch.equal(cpu, runs[0][1])
        assert torch.equal(cuda, runs[0][2])


@pytest.mark.parametrize("level", ["standard", "full"])
def test_a_watched_loop_ends_in_the_same_bits(level: str) -> None:
    def loop(level: str) -> tuple[Net, Tensor]:
        net = make_net()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        torch.manual_seed(7)
        with sl.audit(model=net, optimizers=optimizer, level=level, on_fault="collect") as audit:
            for _, (x, y) in zip(range(30), endless(), strict=False):
                optimizer.zero_grad()
                z = net.features(x)
                (F.cross_entropy(net.head(z), y) + F.mse_loss(net.decoder(z), x)).backward()
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                audit.step()
        assert audit.faults == ()
        return net, torch.cuda.get_rng_state()

    (net, state), (bare, expected) = loop(level), loop("off")
    assert_same(net, bare)
    assert torch.equal(state, expected)
