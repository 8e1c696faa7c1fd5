"""Weights that an update by hand turns into results of operations; and updates that are meant so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

Weights = dict[str, Tensor]
Update = Callable[[Weights], None]


def skips_what_has_none(weights: Weights) -> None:
    for name, w in weights.items():
        if w.grad is None:
            continue
        weights[name] = w - 0.3 * w.grad


def adds_under_a_condition(weights: Weights) -> None:
    for name in list(weights):
        if weights[name].grad is not None:
            step = weights[name].grad * -0.3
            weights[name] = weights[name] + step


def by_getattr(weights: Weights) -> None:
    changed = {n: w - w.grad.clamp(-1, 1) * 0.1 for n, w in weights.items() if getattr(w, "grad", None) is not None}
    weights.update(changed)


def in_place(weights: Weights) -> None:
    with torch.no_grad():
        for w in weights.values():
            if w.grad is not None:
                w -= 0.3 * w.grad
                w.grad = None


def new_leaves(weights: Weights) -> None:
    for name, w in weights.items():
        if w.grad is not None:
            weights[name] = (w - 0.3 * w.grad).detach().requires_grad_()


def in_data(weights: Weights) -> None:
    for w in weights.values():
        if w.grad is not None:
            w.data = w.data - 0.3 * w.grad
            w.grad = None


def _faults(watched: Any, update: Update) -> list[Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    weights: Weights = dict(model.named_parameters())
    with watched(model, None) as audit:
        for _ in range(6):
            x = torch.randn(8, 4)
            F.mse_loss(functional_call(model, weights, (x,)), x[:, :1]).backward()
            update(weights)
            audit.step()
    return [fault for fault in audit.faults if fault.code == "SL315"]


@pytest.mark.parametrize("update", [skips_what_has_none, adds_under_a_condition, by_getattr])
def test_weights_that_are_no_leaves_after_an_update_are_told(watched: Any, update: Update) -> None:
    (fault,) = _faults(watched, update)
    assert fault.severity == "error"
    assert fault.where.count(f"in {update.__name__}") == 2


@pytest.mark.parametrize("update", [in_place, new_leaves, in_data])
def test_weights_that_stay_leaves_are_not(watched: Any, update: Update) -> None:
    assert _faults(watched, update) == []


def test_fast_weights_of_a_first_order_method_are_not(watched: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with watched(model, optimizer) as audit:
        for _ in range(6):
            x = torch.randn(8, 4)
            F.mse_loss(model(x), x[:, :1]).backward()
            fast = {name: p - 0.1 * p.grad for name, p in model.named_parameters() if p.grad is not None}
            optimizer.zero_grad()
            F.mse_loss(functional_call(model, fast, (x + 0.1,)), x[:, :1]).backward()
            for w in fast.values():
                if w.grad is not None:
                    w.grad.zero_()
            optimizer.step()
            optimizer.zero_grad()
            audit.step()
    assert not audit.faults
