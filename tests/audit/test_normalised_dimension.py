"""Losses of probabilities: told where they are normalised over another dimension than the loss takes, else not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]
"""of scores [8, 6, 3] and classes [8, 6]"""


def over_the_batch(scores: Tensor, y: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(scores[:, 0], dim=0), y[:, 0])


def over_time(scores: Tensor, y: Tensor) -> Tensor:
    logp = nn.LogSoftmax(dim=1)(scores)
    return F.nll_loss(logp.reshape(-1, 3), y.flatten())


def logarithm_of_a_softmax(scores: Tensor, y: Tensor) -> Tensor:
    p = scores.transpose(1, 2).softmax(0)
    return nn.NLLLoss()((p + 1e-8).log(), y)


def distilled_over_another(scores: Tensor, y: Tensor) -> Tensor:
    teacher = (3 * scores.detach() + 0.1).softmax(-1)
    return F.kl_div(F.log_softmax(scores, dim=1), teacher, reduction="batchmean")


BAD: list[Loss] = [over_the_batch, over_time, logarithm_of_a_softmax, distilled_over_another]


def over_the_classes(scores: Tensor, y: Tensor) -> Tensor:
    logp = scores.log_softmax(-1).half().float()
    return F.nll_loss(logp.view(-1, 3), y.flatten()) + F.nll_loss(logp.permute(0, 2, 1), y)


def transposed_after(scores: Tensor, y: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(scores[:, 0].T, dim=0).T, y[:, 0])


def contrastive_over_columns(scores: Tensor, y: Tensor) -> Tensor:
    a = F.normalize(scores.mean(1), dim=1)
    similar = a @ a.T.detach() / 0.1
    pairs = torch.arange(8)
    return F.nll_loss(similar.log_softmax(0), pairs) + F.nll_loss(similar.log_softmax(1), pairs)


def attention_maps_compared(scores: Tensor, y: Tensor) -> Tensor:
    teacher = (2 * scores.detach() + 0.1).softmax(1)
    return F.kl_div(F.log_softmax(scores, dim=1), teacher, reduction="batchmean")


def smoothed_targets(scores: Tensor, y: Tensor) -> Tensor:
    target = 0.9 * F.one_hot(y, 3) + 0.1 / 3
    logp = scores.log_softmax(-1)
    return F.kl_div(logp, target, reduction="sum") + F.kl_div(logp, target.log(), reduction="sum", log_target=True)


def some_classes_only(scores: Tensor, y: Tensor) -> Tensor:
    logp = scores[:, 0].log_softmax(-1)
    prior = torch.tensor([0.1, 0.5, 0.4]).log()
    return F.nll_loss(logp[:, :2], y[:, 0].clamp(max=1)) + F.nll_loss(logp + prior, y[:, 0])


def masked_classes(scores: Tensor, y: Tensor) -> Tensor:
    masked = scores[:, 0].masked_fill(torch.tensor([False, False, True]), float("-inf"))
    return F.nll_loss(masked.log_softmax(1), y[:, 0].clamp(max=1))


def one_sequence(scores: Tensor, y: Tensor) -> Tensor:
    return F.nll_loss(scores[0, 0].log_softmax(0), y[0, 0]) + scores.square().mean()


GOOD: list[Loss] = [
    over_the_classes,
    transposed_after,
    contrastive_over_columns,
    attention_maps_compared,
    smoothed_targets,
    some_classes_only,
    masked_classes,
    one_sequence,
]


def _faults(watched: Any, loss_of: Loss) -> list[Any]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watched(model, optimizer) as audit:
        for _ in range(5):
            loss = loss_of(model(torch.randn(8, 6, 4)), torch.randint(0, 3, (8, 6)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            audit.step()
    return [fault for fault in audit.faults if fault.code == "SL460"]


@pytest.mark.parametrize("loss_of", BAD)
def test_a_softmax_over_another_dimension_is_named_with_both_lines(watched: Any, loss_of: Loss) -> None:
    (fault,) = _faults(watched, loss_of)
    assert fault.severity == "error"
    assert f"in {loss_of.__name__}" in fault.where
    assert "normalised at" in fault.where


@pytest.mark.parametrize("loss_of", GOOD)
def test_what_is_normalised_over_the_classes_or_meant_is_not(watched: Any, loss_of: Loss) -> None:
    assert _faults(watched, loss_of) == []
