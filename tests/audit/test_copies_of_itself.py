"""Averages of weights with themselves, and targets that load their own state; and what looks alike."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

After = Callable[[nn.ModuleDict, int], None]


def nets(*, is_alias: bool = False, members: int = 0) -> nn.ModuleDict:
    torch.manual_seed(0)
    online = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    made = nn.ModuleDict({"online": online, "encoder_k": online if is_alias else copy.deepcopy(online)})
    if members:
        made["ensemble"] = nn.ModuleList(nn.Linear(4, 2) for _ in range(members))
    return made


def run(watched: Any, model: nn.ModuleDict, after: After, steps: int = 14) -> list[Any]:
    optimizer = torch.optim.SGD(model["online"].parameters(), lr=0.05)
    with watched(model, optimizer) as audit:
        for step in range(steps):
            x = torch.randn(8, 4)
            with torch.no_grad():
                wanted: Tensor = model["encoder_k"](x)
            loss = F.mse_loss(model["online"](x + 0.1), wanted + x[:, :2])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            after(model, step)
            audit.step()
    return [fault for fault in audit.faults if fault.code == "SL318"]


def pairs(model: nn.ModuleDict) -> Any:
    return zip(model["encoder_k"].parameters(), model["online"].parameters(), strict=True)


@torch.no_grad()
def copied_sum(model: nn.ModuleDict, step: int) -> None:
    for k, q in pairs(model):
        k.copy_(0.9 * k + 0.1 * q)


def sum_of_data(model: nn.ModuleDict, step: int) -> None:
    for k, q in pairs(model):
        k.data = k.data * 0.9 + q.data * (1 - 0.9)


@torch.no_grad()
def product_then_sum(model: nn.ModuleDict, step: int) -> None:
    for k, q in pairs(model):
        k.mul_(0.9)
        k.add_((1 - 0.9) * q)


@torch.no_grad()
def lerp(model: nn.ModuleDict, step: int) -> None:
    for k, q in pairs(model):
        k.lerp_(q, 0.1)


AVERAGES: list[After] = [copied_sum, sum_of_data, product_then_sum, lerp]


@pytest.mark.parametrize("after", AVERAGES)
def test_an_average_of_a_network_with_itself_is_named(watched: Any, after: After) -> None:
    (fault,) = run(watched, nets(is_alias=True), after)
    assert "online.0.weight" in fault.names
    assert f"in {after.__name__}" in fault.where


@pytest.mark.parametrize("after", AVERAGES)
def test_an_average_of_two_networks_is_not(watched: Any, after: After) -> None:
    assert run(watched, nets(), after) == []


def loads_itself(model: nn.ModuleDict, step: int) -> None:
    if step % 4 == 3:
        model["encoder_k"].load_state_dict(model["encoder_k"].state_dict())


def copies_itself(model: nn.ModuleDict, step: int) -> None:
    for k, q in zip(model["encoder_k"].parameters(), model["encoder_k"].parameters(), strict=True):
        k.data.copy_(q.data)


def loads_an_alias_by_turns(model: nn.ModuleDict, step: int) -> None:
    kept = model["encoder_k"].state_dict()
    if step % 2:
        model["encoder_k"].load_state_dict(kept)


@pytest.mark.parametrize("after", [loads_itself, copies_itself, loads_an_alias_by_turns])
def test_a_target_that_loads_its_own_state_is_named(watched: Any, after: After) -> None:
    (fault,) = run(watched, nets(), after)
    assert "encoder_k.0.weight" in fault.names
    assert not any(name.startswith("online") for name in fault.names)
    assert f"in {after.__name__}" in fault.where


def follows(model: nn.ModuleDict, step: int) -> None:
    if step % 4 == 3:
        model["encoder_k"].load_state_dict(model["online"].state_dict())


def all_follow_the_first(model: nn.ModuleDict, step: int) -> None:
    for member in model["ensemble"]:
        member.load_state_dict(model["ensemble"][0].state_dict())


def a_part_is_exchanged(model: nn.ModuleDict, step: int) -> None:
    state = model["encoder_k"].state_dict()
    state.update({name: value for name, value in model["online"].state_dict().items() if name.startswith("0")})
    model["encoder_k"].load_state_dict(state)


def clamped(model: nn.ModuleDict, step: int) -> None:
    for p in model["online"].parameters():
        p.data.copy_(p.data.clamp_(-1, 1))


def an_average_that_begins_in_the_weights(model: nn.ModuleDict, step: int) -> None:
    state = model["online"].state_dict()
    if not step:
        KEPT.update(state)
    for name, value in state.items():
        KEPT[name] = 0.9 * KEPT[name] + 0.1 * value


def decayed_and_scaled(model: nn.ModuleDict, step: int) -> None:
    with torch.no_grad():
        for p in model["online"].parameters():
            p.add_(p, alpha=-1e-3)
            p.copy_(p / p.norm().clamp(min=1))
            p.copy_(0.5 * p + 0.4 * p)


KEPT: dict[str, Any] = {}


@pytest.mark.parametrize(
    "after",
    [
        follows,
        all_follow_the_first,
        a_part_is_exchanged,
        clamped,
        an_average_that_begins_in_the_weights,
        decayed_and_scaled,
    ],
)
def test_what_looks_alike_is_not(watched: Any, after: After) -> None:
    assert run(watched, nets(members=3), after) == []
