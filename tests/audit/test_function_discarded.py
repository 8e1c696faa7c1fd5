"""Custom functions whose result nobody uses; and calls that look alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attach(torch.autograd.Function):
    """Hangs a loss on an output, as Megatron's scaler of auxiliary losses does: no torch function runs in it."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, torch.ones_like(ctx.saved_tensors[0])


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return -ctx.weight * grad, None


class Doubled(torch.autograd.Function):
    """Writes in place, so that nobody needs its result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class Net(nn.Module):
    def __init__(self, use: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.head, self.use = nn.Linear(4, 6), nn.Linear(6, 3), use

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.use(self.body(x)))


def attached_to_nothing(h: Tensor) -> Tensor:
    size = 0.1 * h.square().mean()
    Attach.apply(h, size)
    return h.tanh()


def reversed_for_nobody(h: Tensor) -> Tensor:
    if h.requires_grad:
        Reversed.apply(
            h,
            0.5,
        )
    return h * 2


def attached(h: Tensor) -> Tensor:
    h = Attach.apply(h, 0.1 * h.square().mean())
    return h.tanh()


def in_place(h: Tensor) -> Tensor:
    h = h * 1.5
    Doubled.apply(h)
    return h


def shown_only(h: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        Reversed.apply(h, 0.5)
    return Reversed.apply(h, 0.5).tanh()


def of_a_module(h: Tensor) -> Tensor:
    nn.Linear(2, 2).apply(lambda module: module.eval())
    return h.tanh()


def run(watched: Any, use: Callable[[Tensor], Tensor]) -> list[Any]:
    torch.manual_seed(0)
    model = Net(use)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with watched(model, optimizer) as audit:
        for _ in range(8):
            loss = F.cross_entropy(model(torch.randn(8, 4)), torch.randint(0, 3, (8,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            audit.step()
    return [fault for fault in audit.faults if fault.code == "SL331"]


@pytest.mark.parametrize(("use", "name"), [(attached_to_nothing, "Attach"), (reversed_for_nobody, "Reversed")])
def test_a_result_that_is_thrown_away_is_named_with_its_line(
    watched: Any, use: Callable[[Tensor], Tensor], name: str
) -> None:
    (fault,) = run(watched, use)
    assert f"the result of {name}.apply" in fault.what
    assert f"in {use.__name__}" in fault.where
    assert f"{name}.apply(" in fault.where


@pytest.mark.parametrize("use", [attached, in_place, shown_only, of_a_module])
def test_a_result_that_is_used_or_written_in_place_is_not(watched: Any, use: Callable[[Tensor], Tensor]) -> None:
    assert run(watched, use) == []
