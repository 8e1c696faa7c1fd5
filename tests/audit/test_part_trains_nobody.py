"""Parts of a loss that leave their gradients where they are thrown away; and detached parts that train somebody."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD


class Two:
    """Two networks with an optimizer each."""

    def __init__(self, *, is_conv: bool = False) -> None:
        self.gen: nn.Module = nn.Linear(3, 8)
        self.disc: nn.Module = nn.Linear(8, 1)
        if is_conv:
            self.gen = nn.Sequential(nn.Linear(3, 8), nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 2, 3, padding=1))
            self.disc = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(6, 1))
        self.first = SGD(self.gen.parameters(), lr=0.01)
        self.second = SGD(self.disc.parameters(), lr=0.01)
        self.is_conv = is_conv

    def real(self) -> Tensor:
        return torch.randn(6, 2, 4) if self.is_conv else torch.randn(6, 8)


Step = Callable[[Two, int], None]


def opponent(two: Two, fake: Tensor) -> None:
    two.second.zero_grad()
    (F.softplus(-two.disc(two.real())).mean() + F.softplus(two.disc(fake.detach())).mean()).backward()
    two.second.step()


def detached_in_the_wrong_step(two: Two, i: int) -> None:
    fake = two.gen(torch.randn(6, 3))
    two.first.zero_grad()
    loss = F.l1_loss(fake, two.real())
    loss = loss + 0.1 * F.softplus(-two.disc(fake.detach())).mean()
    loss.backward()
    two.first.step()
    opponent(two, fake)


def computed_without_grad_mode(two: Two, i: int) -> None:
    """The features are taken under no_grad, so that the consistency trains the encoder's opponent alone."""
    x = torch.randn(6, 3)
    two.first.zero_grad()
    h = two.gen(x)
    with torch.no_grad():
        again = two.gen(x + 0.1)
    losses = {"size": h.square().mean(), "consistency": two.disc(again).square().mean()}
    sum(losses.values()).backward()  # type: ignore[union-attr]
    two.first.step()
    opponent(two, h)


BAD: list[tuple[Step, bool]] = [
    (detached_in_the_wrong_step, False),
    (detached_in_the_wrong_step, True),
    (computed_without_grad_mode, False),
]


def adversarial(two: Two, i: int) -> None:
    fake = two.gen(torch.randn(6, 3))
    two.first.zero_grad()
    (F.l1_loss(fake, two.real()) + 0.1 * F.softplus(-two.disc(fake)).mean()).backward()
    two.first.step()
    opponent(two, fake)


def matched_features(two: Two, i: int) -> None:
    fake = two.gen(torch.randn(6, 3))
    two.first.zero_grad()
    matched = F.l1_loss(two.disc(fake), two.disc(two.real()).detach())
    (matched + fake.square().mean()).backward()
    two.first.step()
    opponent(two, fake)


def a_probe_in_the_same_pass(two: Two, i: int) -> None:
    h = two.gen(torch.randn(6, 3))
    loss = h.square().mean() + two.disc(h.detach()).square().mean()
    for optimizer in (two.first, two.second):
        optimizer.zero_grad()
    loss.backward()
    for optimizer in (two.first, two.second):
        optimizer.step()


def a_probe_that_is_stepped_every_other_time(two: Two, i: int) -> None:
    h = two.gen(torch.randn(6, 3))
    loss = h.square().mean() + two.disc(h.detach()).square().mean()
    two.first.zero_grad()
    two.second.zero_grad()
    loss.backward()
    two.first.step()
    if i % 2:
        two.second.step()


def a_probe_whose_gradient_is_logged(two: Two, i: int) -> None:
    h = two.gen(torch.randn(6, 3))
    loss = h.square().mean() + two.disc(h.detach()).square().mean()
    two.first.zero_grad()
    loss.backward()
    assert all(p.grad.norm() >= 0 for p in two.disc.parameters() if p.grad is not None)
    two.first.step()
    two.second.zero_grad()


def a_critic_of_a_frozen_batch(two: Two, i: int) -> None:
    fake = two.gen(torch.randn(6, 3))
    opponent(two, fake)
    two.disc.requires_grad_(False)
    two.first.zero_grad()
    (F.l1_loss(fake, two.real()) + F.softplus(-two.disc(fake)).mean()).backward()
    two.first.step()
    two.disc.requires_grad_(True)


GOOD: list[Step] = [
    adversarial,
    matched_features,
    a_probe_in_the_same_pass,
    a_probe_that_is_stepped_every_other_time,
    a_probe_whose_gradient_is_logged,
    a_critic_of_a_frozen_batch,
]


def faults(watched: Any, step: Step, *, is_conv: bool) -> list[Any]:
    torch.manual_seed(0)
    two = Two(is_conv=is_conv)
    models, optimizers = {"gen": two.gen, "disc": two.disc}, {"first": two.first, "second": two.second}
    with watched(models, optimizers) as audit:
        for i in range(8):
            step(two, i)
            audit.step()
    return [fault for fault in audit.faults if fault.code == "SL465"]


@pytest.mark.parametrize(("step", "is_conv"), BAD)
def test_a_part_whose_gradients_are_thrown_away_is_named(watched: Any, step: Step, is_conv: bool) -> None:
    (fault,) = faults(watched, step, is_conv=is_conv)
    assert "its path to `gen." in fault.what
    assert "leaves in `disc." in fault.what
    assert f"in {step.__name__}" in fault.where


@pytest.mark.parametrize("step", GOOD)
def test_a_part_that_trains_somebody_is_not(watched: Any, step: Step) -> None:
    assert faults(watched, step, is_conv=False) == []
