"""Closures of LBFGS that compute nothing, beside closures that do and steps that need none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import LBFGS, SGD


def problem() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Linear(4, 1), torch.randn(16, 4), torch.randn(16, 1)


def codes(audit: Any) -> list[str]:
    return [fault.code for fault in audit.faults]


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_a_closure_that_returns_a_loss_from_before(search: str | None, watched: Any) -> None:
    model, x, y = problem()
    optimizer = LBFGS(model.parameters(), lr=0.1, max_iter=4, line_search_fn=search)
    with watched(model, optimizer) as audit:
        for _ in range(4):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step(lambda loss=loss: loss)  # type: ignore[arg-type]
            audit.step()
    assert codes(audit) == ["SL672"]


def test_a_closure_that_computes_the_loss_and_no_gradient(watched: Any) -> None:
    model, x, y = problem()
    optimizer = LBFGS(model.parameters(), lr=0.1, max_iter=4)

    def closure() -> float:
        with torch.no_grad():
            return F.mse_loss(model(x), y).item()

    with watched(model, optimizer) as audit:
        for _ in range(4):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step(closure)
            audit.step()
    assert codes(audit) == ["SL672"]


def test_one_step_is_told_at_the_end(watched: Any) -> None:
    model, x, y = problem()
    optimizer = LBFGS(model.parameters(), max_iter=30)
    with watched(model, optimizer) as audit:
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step(lambda: loss)  # type: ignore[arg-type]
    assert codes(audit) == ["SL672"]


def test_a_closure_that_writes_gradients_itself(watched: Any) -> None:
    model, x, y = problem()
    optimizer = LBFGS(model.parameters(), lr=0.1, max_iter=4)

    def closure() -> torch.Tensor:
        loss = F.mse_loss(model(x), y)
        for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            p.grad = g
        return loss

    with watched(model, optimizer) as audit:
        for _ in range(4):
            optimizer.step(closure)  # type: ignore[arg-type]
            audit.step()
    assert codes(audit) == []


def test_a_single_evaluation_needs_no_new_gradient(watched: Any) -> None:
    model, x, y = problem()
    optimizer = LBFGS(model.parameters(), lr=0.1, max_iter=1)
    with watched(model, optimizer) as audit:
        for _ in range(4):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step(lambda loss=loss: loss)  # type: ignore[arg-type]
            audit.step()
    assert codes(audit) == []


def test_another_optimizer_only_wants_the_loss_back(watched: Any) -> None:
    model, x, y = problem()
    optimizer = SGD(model.parameters(), lr=0.1)
    with watched(model, optimizer) as audit:
        for _ in range(6):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step(lambda loss=loss: loss)  # type: ignore[arg-type]
            audit.step()
    assert codes(audit) == []


def test_a_closure_that_has_converged_at_once(watched: Any) -> None:
    model, x, _ = problem()
    optimizer = LBFGS(model.parameters(), max_iter=10)
    target = model(x).detach()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), target)
        loss.backward()
        return loss

    with watched(model, optimizer) as audit:
        for _ in range(4):
            optimizer.step(closure)  # type: ignore[arg-type]
            audit.step()
    assert codes(audit) == []
