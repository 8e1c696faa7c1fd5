"""A `backward` in a module: one that autograd was to call, and others."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import safeloop as sl


class Reversal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x

    def backward(self, grad_output: Tensor) -> Tensor:
        return -grad_output


class StaticSign(nn.Module):
    """Written as a Function would be."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sign() + x - x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Engine(nn.Module):
    """Its `backward` runs that of a loss."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def backward(self, gradient_scaled_loss: Tensor) -> None:
        gradient_scaled_loss.backward()


class OfALoss(nn.Module):
    """Takes a loss, keeps it for later."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def backward(self, loss: Tensor) -> None:
        self.last = loss


class Inherited(Reversal):
    """Has it from its base."""


def codes_of(inner: nn.Module) -> list[str]:
    model = nn.Sequential(nn.Linear(4, 4), inner, nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            audit.step()
    return [fault.code for fault in audit.faults]


@pytest.mark.parametrize("inner", [Reversal(), StaticSign(), Inherited()])
def test_a_derivative_that_nobody_asks_for(inner: nn.Module) -> None:
    """Told by the class."""
    assert codes_of(inner) == ["SL221"]


@pytest.mark.parametrize("inner", [Engine(), OfALoss(), nn.Identity()])
def test_other_methods_of_that_name(inner: nn.Module) -> None:
    """What runs a backward pass, or takes a loss, is no derivative."""
    assert codes_of(inner) == []


def test_one_that_is_called_by_hand(tmp_path: Any) -> None:
    """A file in which some line calls a `backward` with an argument is left alone."""
    path = tmp_path / "by_hand.py"
    path.write_text(
        "from torch import nn\n\n\nclass Layer(nn.Module):\n    def forward(self, x):\n        return 2 * x\n\n"
        "    def backward(self, grad):\n        return 2 * grad\n\n\n"
        f"def chain(layers, grad):\n    for layer in layers:\n        grad = layer{'.'}backward(grad)\n"
    )
    spec = importlib.util.spec_from_file_location("by_hand", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["by_hand"] = module
    try:
        spec.loader.exec_module(module)
        assert codes_of(module.Layer()) == []
    finally:
        del sys.modules["by_hand"]
