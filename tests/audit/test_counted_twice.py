"""Totals that are added to their own parts; and weights that somebody has chosen, which look alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import safeloop as sl

Loss = Callable[[Tensor, Tensor], Tensor]


def parts(scores: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {
        "ce": F.cross_entropy(scores, y),
        "size": scores.square().sum() / (y > 0).sum().clamp(min=1),
        "tv": scores.diff(dim=1).abs().mean(),
    }


def total_stored_last(scores: Tensor, y: Tensor) -> Tensor:
    losses = parts(scores, y)
    losses["total"] = losses["ce"] + losses["size"] + losses["tv"]
    return torch.stack(list(losses.values())).sum()


def total_stored_first(scores: Tensor, y: Tensor) -> Tensor:
    found = parts(scores, y)
    losses = {"loss": sum(found.values())} | found
    return sum(losses.values())  # type: ignore[return-value]


def weighted_total_of_some(scores: Tensor, y: Tensor) -> Tensor:
    losses = parts(scores, y)
    losses["boxes"] = losses["ce"] + 0.1 * losses["size"]
    loss = torch.zeros(())
    for value in losses.values():
        loss += value
    return loss


BAD: list[Loss] = [total_stored_last, total_stored_first, weighted_total_of_some]


def added_once(scores: Tensor, y: Tensor) -> Tensor:
    losses = parts(scores, y)
    return losses["ce"] + (0.1 * losses["size"] + losses["tv"])


def total_kept_without_its_graph(scores: Tensor, y: Tensor) -> Tensor:
    losses = parts(scores, y)
    losses["total"] = (losses["ce"] + losses["size"]).detach()
    return sum(losses.values())  # type: ignore[return-value]


def the_last_of_several_weighs_more(scores: Tensor, y: Tensor) -> Tensor:
    deep = [F.cross_entropy(k * scores, y) for k in (1, 2, 3)]
    return sum(deep) + deep[-1]


def sums_of_stages(scores: Tensor, y: Tensor) -> Tensor:
    a, b, c = parts(scores, y).values()
    first = a + b
    second = first + c
    return first + second


def a_sum_used_twice(scores: Tensor, y: Tensor) -> Tensor:
    a, b, _ = parts(scores, y).values()
    loss = a + b
    return loss + loss


def mixed_up(scores: Tensor, y: Tensor) -> Tensor:
    a, b, _ = parts(scores, y).values()
    return 0.3 * (a + b) + 0.7 * (b + a)


def residuals(scores: Tensor, y: Tensor) -> Tensor:
    h = scores + scores.tanh()
    return (scores + scores.tanh() + h).square().mean() + (h + scores).sum()


def flooded(scores: Tensor, y: Tensor) -> Tensor:
    a, b, _ = parts(scores, y).values()
    return ((a + b) - 0.2).abs() + 0.2 + a


GOOD: list[Loss] = [
    added_once,
    total_kept_without_its_graph,
    the_last_of_several_weighs_more,
    sums_of_stages,
    a_sum_used_twice,
    mixed_up,
    residuals,
    flooded,
]


def summed_up(losses: dict[str, Tensor]) -> Tensor:
    losses["total"] = losses["ce"] + losses["size"]
    losses["total"] += losses["tv"]
    return losses["total"]


def its_helper_has_added_it(scores: Tensor, y: Tensor) -> Tensor:
    losses = parts(scores, y)
    return summed_up(losses) + losses["tv"]


def its_helper_has_added_it_to_a_longer_sum(scores: Tensor, y: Tensor) -> Tensor:
    losses = parts(scores, y)
    loss = summed_up(losses)
    for term in (0.01 * scores.mean().square(), losses["tv"], losses["size"].sqrt()):
        loss = loss + term
    return loss


AGAIN: list[Loss] = [its_helper_has_added_it, its_helper_has_added_it_to_a_longer_sum]


def one_function_adds_it_again(scores: Tensor, y: Tensor) -> Tensor:
    deep = [F.cross_entropy(k * scores, y) for k in (1, 2, 3)]
    loss: dict[str, Any] = {"total": sum(deep)}
    loss["total"] = loss["total"] + deep[-1]
    return loss["total"]  # type: ignore[no-any-return]


def a_factor_of_its_own(scores: Tensor, y: Tensor) -> Tensor:
    losses = parts(scores, y)
    return summed_up(losses) + 0.5 * losses["tv"]


def another_of_the_same_kind(scores: Tensor, y: Tensor) -> Tensor:
    losses = parts(scores, y)
    return summed_up(losses) + parts(0.5 * scores, y)["tv"]


def bound(fit: Tensor, prior: Tensor) -> Tensor:
    return fit + prior


def two_bounds_share_their_prior(scores: Tensor, y: Tensor) -> Tensor:
    prior = scores.square().mean()
    return bound(F.cross_entropy(scores, y), prior) + bound(F.cross_entropy(2 * scores, y), prior)


GOOD += [one_function_adds_it_again, a_factor_of_its_own, another_of_the_same_kind, two_bounds_share_their_prior]


def _faults(watched: Any, loss_of: Loss) -> list[Any]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watched(model, optimizer) as audit:
        for _ in range(5):
            loss = loss_of(model(torch.randn(8, 4)), torch.randint(0, 3, (8,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            audit.step()
    return [fault for fault in audit.faults if fault.code == "SL461"]


@pytest.mark.parametrize("loss_of", BAD)
def test_a_total_beside_its_parts_is_named_with_its_lines(watched: Any, loss_of: Loss) -> None:
    (fault,) = _faults(watched, loss_of)
    assert f"in {loss_of.__name__}" in fault.where
    assert "in parts" in fault.where


@pytest.mark.parametrize("loss_of", AGAIN)
def test_a_part_that_two_functions_add_to_one_total_is_named_with_both_lines(watched: Any, loss_of: Loss) -> None:
    (fault,) = _faults(watched, loss_of)
    assert "in summed_up" in fault.where
    assert f"in {loss_of.__name__}" in fault.where


@pytest.mark.parametrize("loss_of", GOOD)
def test_weights_that_are_chosen_are_not(watched: Any, loss_of: Loss) -> None:
    assert _faults(watched, loss_of) == []


def test_a_trainer_tells_it_of_one_loss() -> None:
    class Run(sl.Trainer):
        def loss(self, batch: Tensor) -> Tensor:
            return total_stored_last(self.model(batch), torch.arange(8) % 3)

    sgd = {"type": "SGD", "lr": 0.1}
    trainer = Run(model=nn.Linear(4, 3), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1})
    trainer.fit()
    assert [fault.code for fault in trainer.faults] == ["SL461"]
