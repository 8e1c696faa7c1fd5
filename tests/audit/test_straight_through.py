"""Straight-through estimators: the wrong ways round are named, the right ones and what looks like them are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import safeloop as sl

Estimate = Callable[[Tensor, Tensor], Tensor]


def _in_steps(x: Tensor, q: Tensor) -> Tensor:
    y = x.detach()
    y = y + q
    return y - x


WRONG: dict[str, Estimate] = {
    "detached first": lambda x, q: x.detach() + (q - x),
    "difference first": lambda x, q: (q - x) + x.detach(),
    "without brackets": lambda x, q: x.detach() + q - x,
    "data": lambda x, q: x.data + (q - x),
    "functions": lambda x, q: torch.add(x.detach(), torch.sub(q, x)),
    "in steps": _in_steps,
    "quantised detached": lambda x, q: x.detach() + (q.detach() - x),
    "both paths cancel": lambda x, q: x + (q.detach() - x),
}
RIGHT: dict[str, Estimate] = {
    "difference detached": lambda x, q: x + (q - x).detach(),
    "difference detached first": lambda x, q: (q - x).detach() + x,
    "without brackets": lambda x, q: q.detach() + x - x.detach(),
    "brackets behind": lambda x, q: q.detach() + (x - x.detach()),
    "mixed": lambda x, q: x + 0.5 * (q.detach() - x),
    "lerp": lambda x, q: x.detach() + 0.1 * (q - x),
    "identity": lambda x, q: x + (2 * x - x),
    "another tensor": lambda x, q: x.detach() + (q - 2 * x),
    "gradient turned on purpose": lambda x, q: 2 * x.detach() - x,
    "residual": lambda x, q: x.detach() + torch.tanh(x),
}


class Quantised(nn.Module):
    def __init__(self, estimate: Estimate) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 3)
        self.decoder = nn.Linear(3, 4)
        self.estimate = estimate

    def forward(self, x: Tensor) -> Tensor:
        code = self.encoder(x)
        return self.decoder(self.estimate(code, torch.round(code * 4) / 4))


def _faults(watched: Any, estimate: Estimate) -> list[Any]:
    torch.manual_seed(0)
    model = Quantised(estimate)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with watched(model, optimizer) as audit:
        for _ in range(4):
            x = torch.randn(8, 4)
            optimizer.zero_grad()
            (model(x) - x).square().mean().backward()
            optimizer.step()
            audit.step()
    return [fault for fault in audit.faults if fault.code == "SL330"]


@pytest.mark.parametrize("name", WRONG)
def test_the_wrong_way_round_is_named_with_its_line_and_parameters(watched: Any, name: str) -> None:
    (fault,) = _faults(watched, WRONG[name])
    assert fault.severity == "error"
    assert fault.names == ("encoder.weight", "encoder.bias")
    assert "test_straight_through.py" in fault.where


@pytest.mark.parametrize("name", RIGHT)
def test_the_right_ones_and_what_looks_like_them_are_not(watched: Any, name: str) -> None:
    assert _faults(watched, RIGHT[name]) == []


def test_a_term_that_is_added_with_value_zero_is_none(watched: Any) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watched(model, optimizer) as audit:
        for _ in range(4):
            optimizer.zero_grad()
            loss, reward = model(torch.randn(8, 4)).square().mean(), model(torch.randn(8, 4)).mean()
            (loss + reward.detach() - reward).backward()
            optimizer.step()
            audit.step()
    assert "SL330" not in [fault.code for fault in audit.faults]


def test_a_trainer_stops_at_it() -> None:
    class Run(sl.Trainer):
        def loss(self, batch: Tensor) -> Tensor:
            return (self.model(batch) - batch).square().mean()

    with pytest.raises(sl.FaultError) as refused:
        Run(
            model=Quantised(WRONG["detached first"]),
            data=[torch.randn(8, 4)],
            optimizers={"type": "SGD", "lr": 0.1},
            run={"max_steps": 1},
        ).fit()
    assert refused.value.fault.code == "SL330"
