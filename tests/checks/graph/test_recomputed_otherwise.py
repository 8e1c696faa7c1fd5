"""Checkpointed regions that compute something else the second time, and those that do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import checkpoint as module
from torch.utils.checkpoint import checkpoint

import safeloop as sl

PLAIN = dict(module._allowed_determinism_checks_to_fns)


def faults_of(
    model: nn.Module, forward: Callable[[Tensor], Tensor], after: Callable[[], Any] = list
) -> tuple[Any, ...]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(6):
            optimizer.zero_grad()
            loss = forward(torch.randn(16, 6)).square().mean()
            after()
            loss.backward()
            optimizer.step()
            audit.step()
    assert module._allowed_determinism_checks_to_fns == PLAIN
    return audit.faults


def dropping() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))


def test_dropout_without_its_random_state_is_told_with_the_call() -> None:
    model = dropping()
    (fault,) = faults_of(model, lambda x: checkpoint(model, x, use_reentrant=False, preserve_rng_state=False))
    assert (fault.code, fault.severity) == ("SL316", "error")
    assert "preserve_rng_state" in fault.why
    assert "checkpoint(model, x" in fault.where


def test_dropout_with_its_random_state_is_well() -> None:
    model = dropping()
    assert not faults_of(model, lambda x: checkpoint(model, x, use_reentrant=False))


def test_nested_checkpoints_are_well() -> None:
    model = dropping()

    def inner(h: Tensor) -> Tensor:
        return checkpoint(model[1:], h, use_reentrant=False)

    assert not faults_of(model, lambda x: checkpoint(lambda h: inner(model[0](h)), x, use_reentrant=False))


class Centred(nn.Module):
    """A running mean that is written before it is used, or after."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self.fc, self.before = nn.Linear(6, 1), before
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        if self.before:
            self.mean = 0.5 * self.mean + 0.5 * (h.detach().mean(0) + 1)
        return (h - self.mean).tanh()


@pytest.mark.parametrize("before", [True, False])
def test_a_state_that_the_region_writes_and_reads_is_told_with_both_lines(before: bool) -> None:
    model = Centred(before)
    faults = faults_of(model, lambda x: checkpoint(model, x, use_reentrant=False))
    assert [fault.code for fault in faults] == ["SL316"] * before
    assert all("Centred.forward" in fault.where and "checkpoint(model" in fault.where for fault in faults)


def test_a_mode_that_is_switched_before_the_backward_pass_is_told() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return (super().forward(x) * (2 if self.training else 1)).tanh()

    model = Scaled(6, 1)

    def forward(x: Tensor) -> Tensor:
        model.train()
        return checkpoint(model, x, use_reentrant=False)

    faults = faults_of(model, forward, after=model.eval)
    assert [fault.code for fault in faults] == ["SL316"]


def test_a_parameter_that_was_changed_is_told_once_and_by_its_name() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    faults = faults_of(
        model,
        lambda x: checkpoint(model, x, use_reentrant=False),
        after=lambda: model[0].weight.data.mul_(0.5),
    )
    assert {fault.code for fault in faults} == {"SL309"}


def test_running_statistics_are_left_to_their_own_check() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    faults = faults_of(model, lambda x: checkpoint(model, x, use_reentrant=False))
    assert [fault.code for fault in faults] == ["SL312"]
