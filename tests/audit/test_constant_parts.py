"""A part of the loss that is a constant: told where it is added to the loss, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import safeloop as sl

Loss = Callable[[Tensor, Tensor], Tensor]


def by_argmax(scores: Tensor, y: Tensor) -> Tensor:
    guess = F.one_hot(scores.argmax(1), 3).float()
    return F.cross_entropy(scores, y) + 0.5 * (guess - F.one_hot(y, 3)).abs().mean()


def by_argmax_in_place(scores: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(scores, y)
    loss += (scores.argmax(1).float() - y).abs().mean()
    return loss / 2


def by_threshold(scores: Tensor, y: Tensor) -> Tensor:
    return 0.1 * scores.square().mean() + ((scores > 0) != (y[:, None] > 1)).float().mean()


def by_detach(scores: Tensor, y: Tensor) -> Tensor:
    fixed = (2 * scores).detach()
    return F.cross_entropy(fixed, y) + 0.01 * scores.square().mean()


BAD: dict[Loss, str] = {
    by_argmax: "error",
    by_argmax_in_place: "error",
    by_threshold: "warning",
    by_detach: "warning",
}


def soft(scores: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(scores, y) + (scores.softmax(1) - F.one_hot(y, 3)).abs().mean()


def pseudo_labels(scores: Tensor, y: Tensor) -> Tensor:
    sure = scores.softmax(1).amax(1) > 0.3
    return F.cross_entropy(scores, y) + (F.cross_entropy(scores, scores.argmax(1), reduction="none") * sure).mean()


def dice_of_pseudo_labels(scores: Tensor, y: Tensor) -> Tensor:
    p, t = scores.softmax(1)[:, 0], (scores.argmax(1) == 0).float()
    return 1 - 2 * (p * t).sum() / (p.sum() + t.sum() + 1)


def count_as_divisor(scores: Tensor, y: Tensor) -> Tensor:
    return scores.square().sum() / (scores.square().mean() + (scores > 0).sum())


def detached_scalar(scores: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(scores, y)
    return loss + 0.1 * scores.square().mean().detach()


def compared_with_noise(scores: Tensor, y: Tensor) -> Tensor:
    p = scores.sigmoid()
    drawn = (torch.rand(p.shape) < p).float()
    cost = (drawn - 1).square().mean(1)
    return cost.mean() + (F.binary_cross_entropy(p, drawn, reduction="none").mean(1) * (cost - 0.5)).mean()


def drawn_from_a_distribution(scores: Tensor, y: Tensor) -> Tensor:
    choice = torch.distributions.Categorical(logits=scores)
    action = choice.sample()
    cost = (action - y).abs().float()
    return cost.mean() + (choice.log_prob(action) * cost).mean()


def drawn_by_gumbel(scores: Tensor, y: Tensor) -> Tensor:
    action = (scores - torch.rand_like(scores).log().neg().log()).argmax(1)
    cost = (action - y).abs().float()
    return cost.mean() - (F.cross_entropy(scores, action, reduction="none") * cost).mean()


GOOD: list[Loss] = [
    soft,
    pseudo_labels,
    dice_of_pseudo_labels,
    count_as_divisor,
    detached_scalar,
    compared_with_noise,
    drawn_from_a_distribution,
    drawn_by_gumbel,
]


def _faults(watched: Any, loss_of: Loss) -> list[Any]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watched(model, optimizer) as audit:
        for _ in range(5):
            loss = loss_of(model(torch.randn(8, 4)), torch.randint(0, 3, (8,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            audit.step()
    return [fault for fault in audit.faults if fault.code == "SL450"]


@pytest.mark.parametrize("loss_of", BAD)
def test_a_constant_part_is_named_with_its_line(watched: Any, loss_of: Loss) -> None:
    (fault,) = _faults(watched, loss_of)
    assert fault.severity == BAD[loss_of]
    assert fault.names == ("weight", "bias")
    assert f"in {loss_of.__name__}" in fault.where


@pytest.mark.parametrize("loss_of", GOOD)
def test_what_is_no_constant_part_or_is_meant_is_not(watched: Any, loss_of: Loss) -> None:
    assert _faults(watched, loss_of) == []


def test_a_sum_that_is_only_logged_is_not(watched: Any) -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shown = []
    with watched(model, optimizer) as audit:
        for _ in range(5):
            scores, y = model(torch.randn(8, 4)), torch.randint(0, 3, (8,))
            loss = F.cross_entropy(scores, y)
            shown.append((loss + (scores.argmax(1) != y).float().mean()).item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            audit.step()
    assert not audit.faults


def test_a_trainer_stops_at_it() -> None:
    class Run(sl.Trainer):
        def loss(self, batch: Tensor) -> Tensor:
            return by_argmax(self.model(batch), torch.zeros(8, dtype=torch.long))

    sgd = {"type": "SGD", "lr": 0.1}
    with pytest.raises(sl.FaultError) as refused:
        Run(model=nn.Linear(4, 3), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    assert refused.value.fault.code == "SL450"
