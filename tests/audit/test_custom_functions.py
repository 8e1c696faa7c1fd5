"""Custom functions in losses: backwards that are wrong only where something multiplies or differentiates them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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


class SlopeKept(torch.autograd.Function):
    """a softplus that keeps its slope instead of its argument"""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.sigmoid())
        return F.softplus(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0]


class WithoutGraph(torch.autograd.Function):
    """a swish whose backward computes a part of its slope under no_grad"""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            s = x.sigmoid()
        return g * (s + x * s * (1 - s))


class OutputKept(torch.autograd.Function):
    """a tanh that keeps its output, which has a graph"""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (1 - ctx.saved_tensors[0] ** 2)


class ArgumentKept(torch.autograd.Function):
    """a softplus that keeps its argument, beside the tensors meant for it"""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x
        return F.softplus(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.x.sigmoid()


class MaskKept(torch.autograd.Function):
    """a leaky relu that keeps which entries were positive: its second derivative is zero"""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = torch.where(x > 0, 1.0, 0.1)
        return x * ctx.slope

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.slope.to(g.dtype)


class Once(SlopeKept):
    """says that it can be differentiated once only"""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0]


class RoundedKeepingSlope(torch.autograd.Function):
    """rounds, with a surrogate slope that it keeps: no derivative, on purpose"""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = 1 / (1 + x**2)
        return x.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.slope.to(g.dtype)


class Critic(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(4, 8), nn.Linear(8, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function.apply(self.a(x)))


def _second(watched: Any, function: Any, *, is_used: bool = True) -> list[Any]:
    torch.manual_seed(0)
    critic = Critic(function)
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
    with watched(critic, optimizer) as audit:
        for _ in range(5):
            x = torch.randn(8, 4, requires_grad=True)
            score = critic(x)
            slopes = torch.autograd.grad(
                outputs=score, inputs=x, grad_outputs=torch.ones_like(score), create_graph=is_used
            )
            penalty = (slopes[0].norm(dim=1) - 1).square().mean()
            loss = critic(x).square().mean() + (10 * penalty if is_used else 0.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            audit.step()
    return [fault for fault in audit.faults if fault.code in ("SL313", "SL319")]


@pytest.mark.parametrize("function", [SlopeKept, WithoutGraph])
def test_a_second_derivative_that_lacks_a_part_is_named(watched: Any, function: Any) -> None:
    (fault,) = _second(watched, function)
    assert fault.code == "SL319"
    assert fault.names == (function.__name__,)
    assert "in _second: `slopes = torch.autograd.grad(" in fault.where


@pytest.mark.parametrize("function", [OutputKept, ArgumentKept, MaskKept, RoundedKeepingSlope])
def test_a_second_derivative_that_is_right_or_no_derivative_at_all_is_not(watched: Any, function: Any) -> None:
    assert _second(watched, function) == []


def test_what_is_differentiated_once_need_not_be_right_twice(watched: Any) -> None:
    assert _second(watched, SlopeKept, is_used=False) == []
    assert _second(watched, Once, is_used=False) == []
