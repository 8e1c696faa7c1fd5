"""Branches of a layer that `.data` cuts off, while others of the same tensor go on; and what is cut on purpose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Block(nn.Module):
    """One of several layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm, self.last = nn.LayerNorm(6), nn.Linear(12, 6)


class SelfLoop(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.one(x.data) + self.other(x.roll(1, 0)))


class Normed(Block):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.one(self.norm(x.data)).relu()
        return out


class Joined(Block):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.cat([self.other(x).tanh(), self.one(x.data)], dim=1))
        return out


class Detached(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.one(x.detach()) + self.other(x))


class Gated(Block):
    def forward(self, x: Tensor) -> Tensor:
        gate = self.one(x.data).sigmoid()
        out: Tensor = gate * self.other(x) + x
        return out


class StraightThrough(Block):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.other(x) + (self.one(x).round() - self.one(x)).data
        return out


class OfAnother(Block):
    """The running mean of the batch has no other path."""

    def forward(self, x: Tensor) -> Tensor:
        seen = self.norm(x)
        out: Tensor = self.other(x) + self.one(seen.data)
        return out


class Scaled(Block):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.other(x) / x.data.norm(dim=1, keepdim=True).clamp(min=1)
        return out + 0.1 * torch.randn_like(x) * x.data.std()


def _faults(watched: Any, kind: type[Block]) -> list[Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), kind(), nn.Linear(6, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with watched(model, optimizer) as audit:
        for _ in range(6):
            optimizer.zero_grad()
            (model(torch.randn(8, 4)) - 1).square().mean().backward()
            optimizer.step()
            audit.step()
    return [fault for fault in audit.faults if fault.code == "SL314"]


@pytest.mark.parametrize("kind", [SelfLoop, Normed, Joined])
def test_a_branch_of_data_is_named(watched: Any, kind: type[Block]) -> None:
    (fault,) = _faults(watched, kind)
    assert ".data" in fault.where
    assert fault.names == ("2",)


@pytest.mark.parametrize("kind", [Detached, Gated, StraightThrough, OfAnother, Scaled])
def test_what_is_cut_on_purpose_is_not(watched: Any, kind: type[Block]) -> None:
    assert _faults(watched, kind) == []


def test_a_loss_on_the_data_of_another_network_is_not(watched: Any) -> None:
    torch.manual_seed(0)
    maker, judge = nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 1))
    optimizer = torch.optim.SGD([*maker.parameters(), *judge.parameters()], lr=0.01)
    with watched({"maker": maker, "judge": judge}, optimizer) as audit:
        for _ in range(6):
            fake = maker(torch.randn(8, 4))
            loss = judge(fake.data).relu().mean() + (fake - 1).square().mean() - judge(torch.randn(8, 6)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            audit.step()
    assert "SL314" not in [fault.code for fault in audit.faults]
