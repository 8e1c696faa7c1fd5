"""Gradients that vanish and explode, and such that only look like it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
Y = X[:, :1] - X[:, 1:2]


def stack(activation: Callable[[], nn.Module], depth: int, gain: float = 1.0) -> Callable[[], Any]:
    def make() -> Any:
        layers = [nn.Sequential(nn.Linear(6, 6), activation()) for _ in range(depth)]
        for layer in layers:
            nn.init.normal_(layer[0].weight, std=gain / 6**0.5)
        model = nn.Sequential(*layers, nn.Linear(6, 1))
        return model, lambda i: F.mse_loss(model(X), Y)

    return make


def recurrence(gain: float, steps: int) -> Callable[[], Any]:
    def make() -> Any:
        model = nn.ModuleDict({"cell": nn.Linear(6, 6, bias=False), "first": nn.Linear(6, 6), "head": nn.Linear(6, 1)})
        with torch.no_grad():
            model["cell"].weight.copy_(gain * torch.eye(6))

        def step(i: int) -> Tensor:
            h = model["first"](X)
            for _ in range(steps):
                h = model["cell"](h)
            return F.l1_loss(model["head"](h), Y)

        return model, step

    return make


@pytest.mark.parametrize(
    "make",
    [stack(nn.Sigmoid, 30), stack(nn.Tanh, 40, 0.3), stack(nn.Softsign, 40, 0.3), recurrence(0.2, 30)],
    ids=["sigmoid", "tanh of small weights", "softsign", "recurrence"],
)
def test_a_vanishing_gradient_is_told(make: Any, audited: Any) -> None:
    faults = audited(make)
    assert [fault.code for fault in faults] == ["SL504"], faults
    assert not {"0.0.weight", "first.weight"}.isdisjoint(faults[0].names)


@pytest.mark.parametrize(
    "make",
    [recurrence(3.0, 30), stack(nn.Identity, 30, 4.0), stack(nn.ReLU, 40, 4.0)],
    ids=["recurrence", "linear stack", "relu stack"],
)
def test_an_exploding_gradient_is_told(make: Any, audited: Any) -> None:
    faults = audited(make, lr=1e-6)
    assert [fault.code for fault in faults if fault.code != "SL504"] == ["SL505"], faults


def test_a_gradient_whose_norm_overflows_is_told_with_the_others(audited: Any) -> None:
    """Entries of 1e21 are finite; their squares, and the norm that is computed from them, are not in float32."""

    def make() -> Any:
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 1))
        return model, lambda i: 1e21 * model(X).mean()

    (fault,) = audited(make, lr=1e-30)
    assert fault.code == "SL505"
    assert {"0.weight", "1.weight"} <= set(fault.names)


@pytest.mark.parametrize(
    "make",
    [stack(nn.ReLU, 10, 1.4), stack(nn.Tanh, 10), stack(nn.GELU, 6), recurrence(1.0, 30), recurrence(0.9, 30)],
    ids=["relu", "tanh", "gelu", "unit recurrence", "contracting recurrence"],
)
def test_a_healthy_depth_is_not_told(make: Any, audited: Any) -> None:
    assert audited(make) == []


def test_a_loss_that_is_summed_over_many_is_not_told(audited: Any) -> None:
    def make() -> Any:
        model = nn.Linear(6, 1)
        return model, lambda i: 1e4 * F.mse_loss(model(X), Y, reduction="sum")

    assert audited(make) == []
