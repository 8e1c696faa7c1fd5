"""Updates by hand that go nowhere, beside correct loops that compute new values of the same kind and use them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

LOST: list[Callable[[nn.Module, list[Any]], None]] = []
KEPT: list[Callable[[nn.Module, list[Any]], None]] = []


def lost(step: Callable[[nn.Module, list[Any]], None]) -> Callable[[nn.Module, list[Any]], None]:
    """Add an update that changes nothing."""
    LOST.append(step)
    return step


def kept(step: Callable[[nn.Module, list[Any]], None]) -> Callable[[nn.Module, list[Any]], None]:
    """Add one that does, or whose result serves something else."""
    KEPT.append(step)
    return step


def run(step: Callable[[nn.Module, list[Any]], None], watched: Any) -> list[Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))
    memory: list[Any] = []
    with watched(model) as audit:
        for _ in range(8):
            model.zero_grad()
            loss_of(model).backward()
            step(model, memory)
            audit.step()
    return list(audit.faults)


def loss_of(model: nn.Module, weights: dict[str, Tensor] | None = None) -> Tensor:
    x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
    return F.cross_entropy(model(x) if weights is None else functional_call(model, weights, (x,)), y)


@pytest.mark.parametrize("step", LOST, ids=lambda step: step.__name__)
def test_an_update_that_goes_nowhere_is_named(step: Any, watched: Any) -> None:
    faults = run(step, watched)
    assert [fault.code for fault in faults] == ["SL671"]
    assert {"0.weight", "3.weight"} <= set(faults[0].names)
    assert "test_thrown_away.py" in faults[0].where


@pytest.mark.parametrize("step", KEPT, ids=lambda step: step.__name__)
def test_a_value_that_is_used_is_not(step: Any, watched: Any) -> None:
    assert run(step, watched) == []


@lost
def method_without_its_underscore(model: nn.Module, memory: list[Any]) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.sub(0.1 * p.grad)


@lost
@torch.no_grad()
def momentum_by_hand(model: nn.Module, memory: list[Any]) -> None:
    if not memory:
        memory.extend(torch.zeros_like(p) for p in model.parameters())
    for p, velocity in zip(model.parameters(), memory, strict=True):
        velocity.mul_(0.9).add_(p.grad)
        p = p - 0.1 * velocity


@lost
def data_is_rebound(model: nn.Module, memory: list[Any]) -> None:
    for p in model.parameters():
        weight, gradient = p.data, p.grad
        with torch.no_grad():
            weight = torch.add(
                weight,
                gradient,
                alpha=-0.1,
            )


@lost
def decayed_first(model: nn.Module, memory: list[Any]) -> None:
    gradients = torch.autograd.grad(loss_of(model), list(model.parameters()))
    with torch.no_grad():
        for p, g in zip(model.parameters(), gradients, strict=True):
            p = p * 0.99 - 0.1 * g


@kept
def in_place(model: nn.Module, memory: list[Any]) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad


@kept
def through_data(model: nn.Module, memory: list[Any]) -> None:
    for p in model.parameters():
        p.data = p.data - 0.1 * p.grad


@kept
@torch.no_grad()
def rebound_and_copied_back(model: nn.Module, memory: list[Any]) -> None:
    for p in model.parameters():
        old = p
        p = p - 0.1 * p.grad
        old.copy_(p)


@kept
@torch.no_grad()
def new_parameters(model: nn.Module, memory: list[Any]) -> None:
    for path, p in list(model.named_parameters()):
        module = model.get_submodule(path.rpartition(".")[0])
        gradient = p.grad
        p = p - 0.1 * gradient
        setattr(module, path.rpartition(".")[2], nn.Parameter(p))


@kept
def fast_weights_of_a_frozen_initialisation(model: nn.Module, memory: list[Any]) -> None:
    with torch.no_grad():
        fast = {name: p - 0.1 * p.grad for name, p in model.named_parameters()}
        memory.append(float(loss_of(model, fast)))


@kept
def fast_weights_one_after_the_other(model: nn.Module, memory: list[Any]) -> None:
    fast = {}
    for name, p in model.named_parameters():
        with torch.no_grad():
            p = p - 0.1 * p.grad
        fast[name] = p.detach().requires_grad_()
    memory.append(loss_of(model, fast).item())


@kept
def one_layer_is_adapted_in_a_function(model: nn.Module, memory: list[Any]) -> None:
    def adapted() -> float:
        weight = model[3].weight
        for _ in range(3):
            (gradient,) = torch.autograd.grad(loss_of(model, {"3.weight": weight}), weight)
            with torch.no_grad():
                weight = weight - 0.1 * gradient
            weight.requires_grad_()
        return loss_of(model, {"3.weight": weight}).item()

    memory.append(adapted())


@kept
@torch.no_grad()
def fisher_information(model: nn.Module, memory: list[Any]) -> None:
    if not memory:
        memory.extend(torch.zeros_like(p) for p in model.parameters())
    for i, p in enumerate(model.parameters()):
        memory[i] = memory[i] + p.grad**2


@kept
@torch.no_grad()
def how_far_a_step_would_go(model: nn.Module, memory: list[Any]) -> None:
    for p in model.parameters():
        p = p - 0.1 * p.grad
        memory.append(p.norm())


@kept
def saliency_of_the_input(model: nn.Module, memory: list[Any]) -> None:
    x = torch.randn(8, 4, requires_grad=True)
    model(x).logsumexp(1).sum().backward()
    with torch.no_grad():
        x = x + 0.1 * x.grad.sign()
    memory.append(model(x).sum().item())
