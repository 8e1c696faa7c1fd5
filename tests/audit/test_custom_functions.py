"""Custom functions in losses: backwards that are wrong only where something multiplies or differentiates them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import safeloop as sl

Loss = Callable[[Tensor, Tensor], Tensor]


def one_minus_overlap(p: Tensor, t: Tensor) -> Tensor:
    return 1 - 2 * (p * t).sum() / (p + t).sum()


class DiceOfOne(torch.autograd.Function):
    """a loss whose backward takes the incoming gradient to be one"""

    @staticmethod
    def forward(ctx: Any, p: Tensor, t: Tensor) -> Tensor:
        ctx.save_for_backward(p, t)
        return one_minus_overlap(p, t)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        p, t = ctx.saved_tensors
        total = (p + t).sum()
        return -2 * (t * total - (p * t).sum()) / total**2, None


class Dice(DiceOfOne):
    """the same, times the incoming gradient"""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g * DiceOfOne.backward(ctx, g)[0], None


class FusedEntropy(torch.autograd.Function):
    """a fused cross-entropy, whose gradient is computed in the forward"""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, t: Tensor) -> Tensor:
        ctx.slope = (scores.sigmoid() - t) / t.numel()
        return F.binary_cross_entropy_with_logits(scores, t.to(scores.dtype))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return ctx.slope, None


def weighted(scores: Tensor, t: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, t) + 0.1 * DiceOfOne.apply(scores.sigmoid(), t)


def mean_over_samples(scores: Tensor, t: Tensor) -> Tensor:
    each = [DiceOfOne.apply(s.sigmoid(), y) for s, y in zip(scores, t, strict=True)]
    return torch.stack(each).mean()


def divided_for_accumulation(scores: Tensor, t: Tensor) -> Tensor:
    loss = FusedEntropy.apply(scores, t) + scores.square().mean()
    loss /= 4
    return loss


def alone(scores: Tensor, t: Tensor) -> Tensor:
    return FusedEntropy.apply(scores, t)


def added(scores: Tensor, t: Tensor) -> Tensor:
    return 1.0 * (DiceOfOne.apply(scores.sigmoid(), t) + 0.1 * scores.square().mean())


def added_per_sample(scores: Tensor, t: Tensor) -> Tensor:
    return torch.stack([DiceOfOne.apply(s.sigmoid(), y) for s, y in zip(scores, t, strict=True)]).sum()


def used_properly(scores: Tensor, t: Tensor) -> Tensor:
    return 0.1 * Dice.apply(scores.sigmoid(), t) + scores.square().mean() / 4


def logged_with_a_weight(scores: Tensor, t: Tensor) -> Tensor:
    loss = DiceOfOne.apply(scores.sigmoid(), t)
    _ = (0.1 * loss).item()
    return loss


def _codes(watched: Any, loss_of: Loss) -> list[Any]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watched(model, optimizer) as audit:
        for _ in range(5):
            loss = loss_of(model(torch.randn(8, 4)), (torch.rand(8, 3) < 0.6).float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            audit.step()
    return [fault for fault in audit.faults if fault.code in ("SL313", "SL319")]


@pytest.mark.parametrize("loss_of", [weighted, mean_over_samples, divided_for_accumulation])
def test_a_scaled_loss_whose_gradient_is_not_scaled_is_named(watched: Any, loss_of: Loss) -> None:
    (fault,) = _codes(watched, loss_of)
    assert fault.names[0] in ("DiceOfOne", "FusedEntropy")
    assert f"in {loss_of.__name__}" in fault.where


@pytest.mark.parametrize("loss_of", [alone, added, added_per_sample, used_properly, logged_with_a_weight])
def test_a_gradient_of_one_is_right_where_nothing_multiplies_it(watched: Any, loss_of: Loss) -> None:
    assert _codes(watched, loss_of) == []


def test_a_trainer_tells_it_too() -> None:
    class Run(sl.Trainer):
        def loss(self, batch: Tensor) -> Tensor:
            return weighted(self.model(batch), (batch[:, :3] > 0).float())

    sgd = {"type": "SGD", "lr": 0.1}
    trainer = Run(model=nn.Linear(4, 3), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1})
    trainer.fit()
    assert [fault.code for fault in trainer.faults] == ["SL313"]
