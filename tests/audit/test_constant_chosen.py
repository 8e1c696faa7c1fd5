"""Floors and caps that are always chosen in place of a term; and those that are chosen now and then, or soon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor, int], Tensor]


def a_floor_in_another_unit(scores: Tensor, y: Tensor, i: int) -> Tensor:
    size = scores.square().sum(1).mean()
    return F.cross_entropy(scores, y) + 0.1 * max(torch.tensor(4096.0), size)


def a_cap_that_all_exceed(scores: Tensor, y: Tensor, i: int) -> Tensor:
    spread = 1000 * (1 + scores.var())
    return sum([F.cross_entropy(scores, y), min(0.5, spread)])  # type: ignore[return-value, list-item]


def a_branch_that_never_comes(scores: Tensor, y: Tensor, i: int) -> Tensor:
    size, floor = scores.abs().mean(), torch.full((), 500.0)
    term = size
    if size < floor:
        term = floor
    return term + F.cross_entropy(scores, y)


BAD: list[Loss] = [a_floor_in_another_unit, a_cap_that_all_exceed, a_branch_that_never_comes]


def free_bits_of_a_young_run(scores: Tensor, y: Tensor, i: int) -> Tensor:
    return F.cross_entropy(scores, y) + max(torch.tensor(8.0), scores.square().mean())


def free_bits_that_are_exceeded_in_the_end(scores: Tensor, y: Tensor, i: int) -> Tensor:
    return F.cross_entropy(scores, y) + max(torch.tensor(500.0), (1000.0 if i > 14 else 0.1) * (1 + scores.var()))


def a_term_that_is_always_chosen(scores: Tensor, y: Tensor, i: int) -> Tensor:
    return F.cross_entropy(scores, y) + max(torch.tensor(1e-6), 1 + scores.square().mean())


def an_offset_beside_a_guard(scores: Tensor, y: Tensor, i: int) -> Tensor:
    loss = F.cross_entropy(scores, y)
    if loss > 1e6:
        raise RuntimeError("diverged")
    return loss + 1.0


def a_hinge(scores: Tensor, y: Tensor, i: int) -> Tensor:
    return F.cross_entropy(scores, y) + torch.relu(torch.tensor(0.5) - scores.var())


GOOD: list[Loss] = [
    free_bits_of_a_young_run,
    free_bits_that_are_exceeded_in_the_end,
    a_term_that_is_always_chosen,
    an_offset_beside_a_guard,
    a_hinge,
]


def faults(watched: Any, loss_of: Loss) -> list[Any]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with watched(model, optimizer) as audit:
        for i in range(18):
            loss = loss_of(model(torch.randn(8, 4)), torch.randint(0, 3, (8,)), i)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            audit.step()
    return [fault for fault in audit.faults if fault.code == "SL466"]


@pytest.mark.parametrize("loss_of", BAD)
def test_a_constant_that_is_always_chosen_is_named(watched: Any, loss_of: Loss) -> None:
    (fault,) = faults(watched, loss_of)
    assert "all of 18 times" in fault.what
    assert f"in {loss_of.__name__}" in fault.where


@pytest.mark.parametrize("loss_of", GOOD)
def test_a_floor_that_may_be_exceeded_is_not(watched: Any, loss_of: Loss) -> None:
    assert faults(watched, loss_of) == []
