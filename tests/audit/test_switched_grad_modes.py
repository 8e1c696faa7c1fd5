"""Grad modes that a flag switches off, which is meant, and flags that speak of something else."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Net(nn.Module):
    """A trunk whose grad mode depends on a flag that is off."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(4, 6), nn.Linear(6, 1)
        self.track = self.is_learnt = self.fixed = False

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x).relu())
        return out

    def features(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Anded(Net):
    def features(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.track and torch.is_grad_enabled()):
            return self.trunk(x)  # type: ignore[no-any-return]


class ByName(Net):
    def features(self, x: Tensor) -> Tensor:
        mode = torch.is_grad_enabled() and self.track
        with torch.set_grad_enabled(mode):
            return self.trunk(x)  # type: ignore[no-any-return]


class Meant(Net):
    def features(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.is_learnt and torch.is_grad_enabled()):
            return self.trunk(x)  # type: ignore[no-any-return]


class Tuned(Net):
    finetune = False

    def features(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.finetune):
            return self.trunk(x)  # type: ignore[no-any-return]


class Fixed(Net):
    def features(self, x: Tensor) -> Tensor:
        with contextlib.nullcontext() if self.fixed else torch.no_grad():
            return self.trunk(x)  # type: ignore[no-any-return]


class Counted(Net):
    seen = 0

    def features(self, x: Tensor) -> Tensor:
        self.seen += 1
        with torch.set_grad_enabled(self.seen > 100 and torch.is_grad_enabled()):
            return self.trunk(x)  # type: ignore[no-any-return]


def _codes(watched: Any, net: Net) -> list[str]:
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    with watched(net, optimizer) as audit:
        for _ in range(24):
            optimizer.zero_grad()
            (net(torch.randn(8, 4)) - 1).square().mean().backward()
            optimizer.step()
            audit.step()
    return [f"{fault.code} {fault.names[0]}" for fault in audit.faults]


@pytest.mark.parametrize("kind", [Anded, ByName])
def test_a_mode_that_asks_for_the_mode_says_nothing_of_training(watched: Any, kind: type[Net]) -> None:
    assert _codes(watched, kind()) == ["SL502 trunk.weight"]


@pytest.mark.parametrize("kind", [Meant, Tuned, Fixed, Counted])
def test_a_flag_about_training_is_meant(watched: Any, kind: type[Net]) -> None:
    assert _codes(watched, kind()) == []
