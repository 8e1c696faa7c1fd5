"""Losses that leave gradients in the networks that they come through; and losses that train them on purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

Loop = Callable[[nn.ModuleDict, dict[str, Any], bool], None]


@contextmanager
def frozen(module: nn.Module, *, is_on: bool) -> Iterator[None]:
    module.requires_grad_(not is_on)
    yield
    module.requires_grad_(True)


def actor_and_critic(nets: nn.ModuleDict, optimizers: dict[str, Any], is_bad: bool) -> None:
    x, reward = torch.randn(8, 4), torch.randn(8, 1)
    optimizers["outer"].zero_grad()
    F.mse_loss(nets["outer"](torch.randn(8, 4)), reward).backward()
    with frozen(nets["outer"], is_on=not is_bad):
        optimizers["inner"].zero_grad()
        (-nets["outer"](nets["inner"](x))).mean().backward()
    optimizers["outer"].step()
    optimizers["inner"].step()


def both_players_at_once(nets: nn.ModuleDict, optimizers: dict[str, Any], is_bad: bool) -> None:
    fake = nets["inner"](torch.randn(8, 4))
    optimizers["outer"].zero_grad()
    real_loss = F.softplus(-nets["outer"](torch.randn(8, 4))).mean()
    (real_loss + F.softplus(nets["outer"](fake.detach())).mean()).backward()
    optimizers["inner"].zero_grad()
    loss: Tensor = F.softplus(-nets["outer"](fake)).mean()
    loss.backward(inputs=None if is_bad else list(nets["inner"].parameters()))
    for optimizer in optimizers.values():
        optimizer.step()


def stepped_at_last(nets: nn.ModuleDict, optimizers: dict[str, Any], is_bad: bool) -> None:
    optimizers["outer"].zero_grad(set_to_none=False)
    (nets["outer"](torch.randn(8, 4)) - 1).abs().mean().backward()
    if not is_bad:
        optimizers["outer"].step()
    optimizers["inner"].zero_grad(set_to_none=False)
    nets["outer"](nets["inner"](torch.randn(8, 4))).square().mean().backward()
    optimizers["inner"].step()
    if is_bad:
        optimizers["outer"].step()


LOOPS: list[Loop] = [actor_and_critic, both_players_at_once, stepped_at_last]


def _faults(watched: Any, loop: Callable[..., None], *more: Any) -> list[Any]:
    torch.manual_seed(0)
    nets = nn.ModuleDict({"outer": nn.Linear(4, 1), "inner": nn.Linear(4, 4)})
    optimizers = {name: SGD(net.parameters(), lr=0.01) for name, net in nets.items()}
    with watched(nets, optimizers) as audit:
        for _ in range(6):
            loop(nets, optimizers, *more)
            audit.step()
    return list(audit.faults)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loss_for_another_that_stays_in_grad_is_named(watched: Any, loop: Loop) -> None:
    (fault,) = [fault for fault in _faults(watched, loop, True) if fault.code == "SL633"]
    assert set(fault.names) == {"outer.weight", "outer.bias"}
    assert "for `inner`" in fault.what
    assert f"in {loop.__name__}" in fault.where


@pytest.mark.parametrize("loop", LOOPS)
def test_one_that_is_kept_out_is_not(watched: Any, loop: Loop) -> None:
    assert not [fault for fault in _faults(watched, loop, False) if fault.code == "SL633"]


def zeroed_together(nets: nn.ModuleDict, optimizers: dict[str, Any]) -> None:
    for optimizer in optimizers.values():
        optimizer.zero_grad()
    (nets["outer"](torch.randn(8, 4)) - 1).square().mean().backward()
    (nets["outer"](nets["inner"](torch.randn(8, 4))) - 1).square().mean().backward()
    for optimizer in optimizers.values():
        optimizer.step()


def zeroed_after_the_steps(nets: nn.ModuleDict, optimizers: dict[str, Any]) -> None:
    (nets["outer"](torch.randn(8, 4)) - 1).square().mean().backward()
    (nets["outer"](nets["inner"](torch.randn(8, 4))) - 1).square().mean().backward()
    for optimizer in optimizers.values():
        optimizer.step()
        optimizer.zero_grad()


def a_body_under_two_heads(nets: nn.ModuleDict, optimizers: dict[str, Any]) -> None:
    optimizers["inner"].zero_grad()
    nets["inner"](torch.randn(8, 4)).square().mean().backward()
    optimizers["outer"].zero_grad()
    (nets["outer"](nets["inner"](torch.randn(8, 4))) - 1).square().mean().backward()
    optimizers["inner"].step()
    optimizers["outer"].step()


@pytest.mark.parametrize("loop", [zeroed_together, zeroed_after_the_steps, a_body_under_two_heads])
def test_losses_that_train_both_are_not(watched: Any, loop: Callable[..., None]) -> None:
    assert not _faults(watched, loop)
