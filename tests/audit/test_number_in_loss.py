"""Parts of a loss that are Python numbers; and numbers beside, or as factors of, what trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[["Run", Tensor, Tensor], Tensor]


class Run:
    """A loop's own state: a weight, and what it logs."""

    def __init__(self) -> None:
        self.beta = 0.3
        self.log: dict[str, float] = {}
        self.total = 0.0
        self.margin = 0.25


def kept_as_a_number(run: Run, scores: Tensor, y: Tensor) -> Tensor:
    size = scores.square().mean().detach().item()
    return F.cross_entropy(scores, y) + run.beta * size


def all_terms_as_numbers_but_one(run: Run, scores: Tensor, y: Tensor) -> Tensor:
    terms = [F.cross_entropy(scores, y), float(scores.abs().mean().detach()), scores.var(dim=1).mean().item()]
    return sum(terms)  # type: ignore[return-value]


def added_from_the_log(run: Run, scores: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(scores, y)
    run.log["size"] = scores.square().mean().item()
    loss += run.log["size"] * run.beta
    return loss / 2


def taken_on_the_same_line(run: Run, scores: Tensor, y: Tensor) -> Tensor:
    size = scores.square().mean()
    return F.cross_entropy(scores, y) + run.beta * size.item()


BAD: list[Loss] = [kept_as_a_number, all_terms_as_numbers_but_one, added_from_the_log, taken_on_the_same_line]


def logged_beside(run: Run, scores: Tensor, y: Tensor) -> Tensor:
    size = scores.square().mean()
    loss = F.cross_entropy(scores, y) + run.beta * size
    run.log["size"] = size.item()
    run.total += loss.item() + run.log["size"]
    return loss


def balanced_by_a_factor(run: Run, scores: Tensor, y: Tensor) -> Tensor:
    fit, size = F.cross_entropy(scores, y), scores.square().mean()
    weight = fit.item() / max(size.item(), 1e-6)
    return fit + weight * size


def over_its_own_size(run: Run, scores: Tensor, y: Tensor) -> Tensor:
    fit, size = F.cross_entropy(scores, y), scores.square().mean()
    return fit / fit.item() + size / size.item() + 1e-4


def a_margin_that_adapts(run: Run, scores: Tensor, y: Tensor) -> Tensor:
    margin = scores.detach().std().item()
    apart = F.relu(margin + scores[:, 0] - scores[:, 1]).mean()
    return F.cross_entropy(scores, y) + apart


def flooded_at_an_earlier_level(run: Run, scores: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(scores, y)
    flooded = (loss - run.margin).abs() + run.margin
    run.margin = 0.1 * loss.item()
    return flooded


def counted(run: Run, scores: Tensor, y: Tensor) -> Tensor:
    wrong = (scores.argmax(1) != y).sum().item()
    return F.cross_entropy(scores, y) * (1 + wrong / len(y))


GOOD: list[Loss] = [
    logged_beside,
    balanced_by_a_factor,
    over_its_own_size,
    a_margin_that_adapts,
    flooded_at_an_earlier_level,
    counted,
]


def faults(watched: Any, loss_of: Loss) -> list[Any]:
    torch.manual_seed(0)
    model, run = nn.Linear(4, 3), Run()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watched(model, optimizer) as audit:
        for _ in range(8):
            loss = loss_of(run, model(torch.randn(8, 4)), torch.randint(0, 3, (8,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            audit.step()
    return [fault for fault in audit.faults if fault.code == "SL463"]


@pytest.mark.parametrize("loss_of", BAD)
def test_a_part_that_is_a_number_is_named_with_both_lines(watched: Any, loss_of: Loss) -> None:
    fault = faults(watched, loss_of)[0]
    assert "`weight`" in fault.what
    assert fault.where.count(f"in {loss_of.__name__}") == 2


@pytest.mark.parametrize("loss_of", GOOD)
def test_numbers_beside_and_factors_are_not(watched: Any, loss_of: Loss) -> None:
    assert faults(watched, loss_of) == []


@pytest.mark.parametrize("is_first", [True, False])
def test_the_value_of_a_loss_that_another_pass_trains_is_not(watched: Any, is_first: bool) -> None:
    torch.manual_seed(0)
    model, other = nn.Linear(4, 3), nn.Linear(3, 1)
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.01)
    with watched(nn.ModuleDict({"model": model, "other": other}), optimizer) as audit:
        for _ in range(8):
            scores = model(torch.randn(8, 4))
            critic = other(scores.detach()).square().mean()
            optimizer.zero_grad()
            if is_first:
                critic.backward()
            total = F.cross_entropy(scores, torch.randint(0, 3, (8,))) + critic.item()
            total.backward()
            if not is_first:
                critic.backward()
            optimizer.step()
            audit.step()
    assert [fault for fault in audit.faults if fault.code == "SL463"] == []
