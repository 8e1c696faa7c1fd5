"""Layers that a forward makes anew, and those that only are no part of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import safeloop as sl

Forward = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def faults_of(forward: Forward, further: nn.Module | None = None, steps: int = 6) -> list[Any]:
    torch.manual_seed(0)
    model = Net(forward)
    parameters = [*model.parameters(), *(further.parameters() if further else ())]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(8, 4)), torch.randint(0, 3, (8,))).backward()
            optimizer.step()
            audit.step()
    return list(audit.faults)


def projected(net: Any, x: Tensor) -> Tensor:
    return net.head(nn.Linear(8, 8)(net.body(x)))


def convolved(net: Any, x: Tensor) -> Tensor:
    smooth = nn.Conv1d(1, 1, 3, padding=1)
    return net.head(smooth(net.body(x)[:, None])[:, 0])


def a_sequence(net: Any, x: Tensor) -> Tensor:
    return nn.Sequential(nn.ReLU(), nn.Linear(8, 3))(net.body(x)) + net.head(net.body(x))


@pytest.mark.parametrize("forward", [projected, convolved, a_sequence])
def test_a_layer_made_in_forward(forward: Forward) -> None:
    """Told once a line, with the module whose forward it is."""
    found = [fault for fault in faults_of(forward) if fault.code == "SL220"]
    assert len(found) == 1
    assert "test_layers_made_in_forward.py" in found[0].where


def test_in_a_trainer() -> None:
    """The same in a Trainer."""

    class Run(sl.Trainer):
        def loss(self, batch: Tensor) -> Tensor:
            return self.model(batch).square().mean()

    optimizers = {"type": "SGD", "lr": 0.1}
    model = Net(projected)
    with pytest.raises(sl.FaultError) as error:
        Run(model=model, data=[torch.randn(8, 4)], optimizers=optimizers, run={"max_steps": 6}).fit()
    assert error.value.fault.code == "SL220"


KEPT = [nn.Linear(8, 8) for _ in range(4)]


def kept_elsewhere(net: Any, x: Tensor) -> Tensor:
    h = net.body(x)
    for layer in KEPT:
        h = layer(h)
    return net.head(h)


def without_weights(net: Any, x: Tensor) -> Tensor:
    return net.head(nn.LayerNorm(8, elementwise_affine=False)(nn.Dropout(0.1)(net.body(x))))


def normalised(net: Any, x: Tensor) -> Tensor:
    return net.head(nn.LayerNorm(8)(net.body(x)))


def random_projection(net: Any, x: Tensor) -> Tensor:
    return net.head(nn.Linear(8, 8).requires_grad_(False)(net.body(x)))


def under_no_grad(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        noise = nn.Linear(4, 8)(x)
    return net.head(net.body(x) + 0.01 * noise)


def fast_weights(net: Any, x: Tensor) -> Tensor:
    fast = copy.deepcopy(net.body)
    gradients = torch.autograd.grad(fast(x).square().mean(), [*fast.parameters()])
    with torch.no_grad():
        for parameter, gradient in zip(fast.parameters(), gradients, strict=True):
            parameter -= 0.1 * gradient
    return net.head(fast(x) + net.body(x))


@pytest.mark.parametrize(
    "forward", [kept_elsewhere, without_weights, normalised, random_projection, under_no_grad, fast_weights]
)
def test_what_only_looks_like_it(forward: Forward) -> None:
    """Layers that are kept, have no weights, are not to be trained, or are copies of the model's."""
    further = nn.ModuleList(KEPT) if forward is kept_elsewhere else None
    assert "SL220" not in [fault.code for fault in faults_of(forward, further)]
