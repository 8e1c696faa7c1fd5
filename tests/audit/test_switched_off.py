"""Numbers that a forward in eval mode sets to zero for good, beside what changes them by plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate, self.steps = 0.3, 0
        self.body, self.last = nn.Linear(4, 8), nn.Linear(8, 1)

    def off(self) -> None:
        """What the mode does to the rate."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(self.body(x).relu(), self.rate))


class InTheElse(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        if self.training:
            h = h + self.rate * torch.randn_like(h)
        else:
            self.rate = 0.0
        return self.last(h)


class InOneLine(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.rate = self.rate if self.training else 0.0
        return super().forward(x)


class InAHelper(Base):
    def off(self) -> None:
        if not self.training and torch.is_grad_enabled() is False:
            self.rate = 0

    def forward(self, x: Tensor) -> Tensor:
        self.off()
        return super().forward(x)


class SetForEachMode(Base):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.rate = 0.3
        else:
            self.rate = 0.0
        return super().forward(x)


class BothInOneLine(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.rate = 0.3 if self.training else 0.0
        return super().forward(x)


class Restoring(Base):
    def train(self, mode: bool = True) -> Any:
        if mode:
            self.rate = 0.3
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            self.rate = 0.0
        return super().forward(x)


class EarlyDropout(Base):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
            if self.steps > 5:
                self.rate = 0.0
        return self.last(F.dropout(self.body(x).relu(), self.rate, training=self.training))


class Plain(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(self.body(x).relu(), self.rate, training=self.training))


def run(watched: Any, model: Base, planned: bool = False) -> list[Any]:
    torch.manual_seed(0)
    optimizer = Adam(model.parameters(), lr=1e-2)
    with watched(nn.ModuleDict({"net": model}), optimizer) as audit:
        for i in range(12):
            if planned and i == 6:
                model.rate = 0.0  # a warm-up with dropout is over
            model.train()
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
            optimizer.step()
            if i % 3 == 2:
                model.eval()
                with torch.no_grad():
                    F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1))
            audit.step()
    return [(fault.code, fault.names) for fault in audit.faults]


@pytest.mark.parametrize("kind", [InTheElse, InOneLine, InAHelper])
def test_a_number_that_an_evaluation_takes_away(kind: type[Base], watched: Any) -> None:
    assert run(watched, kind()) == [("SL724", ("net.rate",))]


@pytest.mark.parametrize("kind", [SetForEachMode, BothInOneLine, Restoring, EarlyDropout, Plain])
def test_no_fault_of(kind: type[Base], watched: Any) -> None:
    assert run(watched, kind()) == []


def test_no_fault_of_a_plan_outside(watched: Any) -> None:
    assert run(watched, Plain(), planned=True) == []
