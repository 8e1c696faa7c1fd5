"""The Trainer against plain PyTorch loops written here: the same bits."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import safeloop as sl

STEPS = 100
OFF: dict[str, Any] = {"sinks": []}


class Net(nn.Module):
    """Dropout and BatchNorm, so that random numbers and buffers count."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(16, 3)
        self.decoder = nn.Linear(16, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def make_batches(n: int = 10, size: int = 32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 3, generator=generator)
    inputs = [torch.randn(size, 6, generator=generator) for _ in range(n)]
    return [(x, (x @ weight).argmax(1)) for x in inputs]


def endless(batches: list[Any]) -> Iterator[Any]:
    while True:
        yield from batches


def make_net() -> Net:
    torch.manual_seed(0)
    return Net()


class Classify(sl.Trainer):
    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return F.cross_entropy(self.model(x), y)


def assert_same(ours: nn.Module, plain: nn.Module) -> None:
    expected = plain.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_one_loss_has_the_bits_of_the_plain_loop() -> None:
    net = make_net()
    plain = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True)
    torch.manual_seed(7)
    for _, (x, y) in zip(range(STEPS), endless(make_batches()), strict=False):
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    spec = {"type": "AdamW", "lr": 1e-2, "params": ["body.*", "head.*"]}
    run = {"max_steps": STEPS, "seed": 7}
    Classify(model=net, data=make_batches(), optimizers=spec, frozen=["decoder.*"], run=run, log=OFF).fit()
    assert_same(net, plain)


def test_clipping_a_schedule_and_two_param_groups_have_the_bits_of_the_plain_loop() -> None:
    net = make_net()
    plain = copy.deepcopy(net)
    biases = [p for n, p in plain.named_parameters() if n.endswith("bias") and not n.startswith("decoder")]
    rest = [p for n, p in plain.named_parameters() if not n.endswith("bias") and not n.startswith("decoder")]
    groups = [{"params": biases, "weight_decay": 0.0}, {"params": rest}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
    owned = [*biases, *rest]
    torch.manual_seed(3)
    norms = []
    for _, (x, y) in zip(range(STEPS), endless(make_batches()), strict=False):
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        norms.append(float(nn.utils.clip_grad_norm_(owned, 0.7)))
        optimizer.step()
        scheduler.step()
    assert min(norms) < 0.7 < max(norms), "the test must clip some steps and leave others"
    spec = {
        "type": "AdamW",
        "lr": 1e-2,
        "weight_decay": 0.1,
        "max_norm": 0.7,
        "groups": [{"params": ["*.bias"], "weight_decay": 0.0}],
        "scheduler": {"type": "CosineAnnealingLR", "T_max": STEPS},
    }
    run = {"max_steps": STEPS, "seed": 3}
    Classify(model=net, data=make_batches(), optimizers=spec, frozen=["decoder.*"], run=run, log=OFF).fit()
    assert_same(net, plain)


@pytest.mark.parametrize("name", ["SGD", "Adam", "Adagrad", "RMSprop", "NAdam"])
def test_a_ready_optimizer_has_the_bits_of_the_plain_loop(name: str) -> None:
    net = make_net()
    net.decoder.requires_grad_(False)
    plain = copy.deepcopy(net)
    kind = getattr(torch.optim, name)
    optimizer = kind([p for p in plain.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(0)
    for _, (x, y) in zip(range(30), endless(make_batches()), strict=False):
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    ready = kind([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    Classify(model=net, data=make_batches(), optimizers=ready, run={"max_steps": 30}, log=OFF).fit()
    assert_same(net, plain)


def test_two_weighted_losses_agree_with_the_weighted_sum() -> None:
    class Both(sl.Trainer):
        def losses(self, batch: Any) -> dict[str, torch.Tensor]:
            x, y = batch
            hidden = self.model.body(x)
            return {"ce": F.cross_entropy(self.model.head(hidden), y), "mse": F.mse_loss(self.model.decoder(hidden), x)}

    net = make_net().double()
    plain = copy.deepcopy(net)
    batches = [(x.double(), y) for x, y in make_batches()]
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, fused=True)
    torch.manual_seed(0)
    for _, (x, y) in zip(range(STEPS), endless(batches), strict=False):
        optimizer.zero_grad()
        hidden = plain.body(x)
        (2.0 * F.cross_entropy(plain.head(hidden), y) + 0.5 * F.mse_loss(plain.decoder(hidden), x)).backward()
        optimizer.step()
    spec = {"type": "SGD", "lr": 0.05, "momentum": 0.9}
    weights = {"ce": {"weight": 2.0}, "mse": {"weight": 0.5}}
    Both(model=net, data=batches, optimizers=spec, losses=weights, run={"max_steps": STEPS}, log=OFF).fit()
    for (name, ours), theirs in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-6), name


def test_evaluation_and_logging_and_audit_change_no_bit(tmp_path: Path) -> None:
    class Measured(Classify):
        def metrics(self, batch: Any) -> dict[str, Any]:
            x, y = batch
            torch.rand(3)
            return {"accuracy": self.model(x).argmax(1) == y, "noisy": torch.rand(())}

    def train(**options: Any) -> Net:
        net = make_net()
        net.decoder.requires_grad_(False)
        spec = {"type": "Adam", "lr": 1e-2, "max_norm": 0.5}
        Measured(model=net, data=make_batches(), optimizers=spec, **options).fit()
        return net

    run = {"max_steps": STEPS, "dir": str(tmp_path)}
    quiet = train(run=run, log=OFF, audit={"level": "off"})
    sinks = {"every": 7, "sinks": ["tensorboard", "jsonl"]}
    watched = train(run=run, log=sinks, audit={"level": "full"}, eval_data=make_batches(4), evaluate={"every": 5})
    assert_same(watched, quiet)


def test_a_dataset_is_batched_in_an_order_that_depends_on_seed_and_epoch_alone() -> None:
    x, y = (torch.cat(parts) for parts in zip(*make_batches(), strict=True))
    dataset = torch.utils.data.TensorDataset(x, y)

    def train(seed: int) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []

        class Watch(Classify):
            def loss(self, batch: Any) -> torch.Tensor:
                seen.append(batch[1].clone())
                torch.rand(len(seen))
                return super().loss(batch)

        net = make_net()
        net.decoder.requires_grad_(False)
        data = {"train": dataset, "batch_size": 48}
        run = {"max_epochs": 2, "seed": seed}
        Watch(model=net, data=data, optimizers={"type": "SGD", "lr": 0.1}, run=run, log=OFF).fit()
        return seen

    first, again, other = train(0), train(0), train(1)
    assert [len(batch) for batch in first] == [48] * 6 + [32] + [48] * 6 + [32]
    assert all(map(torch.equal, first, again))
    assert not torch.equal(torch.cat(first), torch.cat(other))
    assert not torch.equal(torch.cat(first[:7]), torch.cat(first[7:]))
