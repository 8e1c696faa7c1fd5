"""Bugs that begin long after the first steps, where no iteration is looked at in depth: hooks alone still see them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

import safeloop as sl

BEGINS, STEPS = 60, 90


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def loss_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(torch.randn(8, 4)), torch.randint(0, 3, (8,)))


def codes(happens: Callable[[int, nn.Module, SGD, dict[str, Any]], None], **options: Any) -> list[str]:
    """The codes of a loop in which something happens at the start of each iteration."""
    model, kept = net(), {}
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    audit = sl.audit(model=model, optimizers=optimizer, budget=0.0, on_fault="collect", **options)
    with audit:
        for step in range(STEPS):
            happens(step, model, optimizer, kept)
            if "scaler" not in kept:
                for p in filter(lambda p: p.requires_grad, model.parameters()):
                    p.grad = None
                loss_of(model).backward()
                optimizer.step()
            audit.step()
        assert audit._watch is not None
        assert audit._watch.journal.state.updates == {"main": STEPS - kept.get("skipped", 0)}
    return [fault.code for fault in audit.faults]


def test_without_a_bug_nothing_is_said() -> None:
    assert codes(lambda *_: None) == []


def test_a_rate_that_falls_to_zero() -> None:
    def happens(step: int, model: nn.Module, optimizer: SGD, kept: dict[str, Any]) -> None:
        if step == BEGINS:
            optimizer.param_groups[0]["lr"] = 0.0

    assert codes(happens) == ["SL647"]


def test_frozen_parameters_that_keep_their_gradient() -> None:
    def happens(step: int, model: nn.Module, optimizer: SGD, kept: dict[str, Any]) -> None:
        if step == BEGINS:
            model[0].requires_grad_(False)  # type: ignore[index]

    assert codes(happens) == ["SL651", "SL650"]


def test_a_part_that_is_frozen_for_good() -> None:
    def happens(step: int, model: nn.Module, optimizer: SGD, kept: dict[str, Any]) -> None:
        if step == BEGINS:
            optimizer.zero_grad()
            model[0].requires_grad_(False)  # type: ignore[index]

    assert codes(happens) == ["SL650"]


def test_a_schedule_of_an_optimizer_that_was_replaced() -> None:
    def happens(step: int, model: nn.Module, optimizer: SGD, kept: dict[str, Any]) -> None:
        if step == 0:
            kept["old"] = StepLR(SGD(model.parameters(), lr=0.1), 1)
        if step >= BEGINS and step % 10 == 0:
            kept["old"].step()

    with pytest.warns(UserWarning, match="lr_scheduler.step"):
        found = codes(happens)
    assert found == ["SL646"]


def test_a_scaler_that_skips_everything() -> None:
    def happens(step: int, model: nn.Module, optimizer: SGD, kept: dict[str, Any]) -> None:
        if step < BEGINS:
            return
        scaler = kept.setdefault("scaler", torch.amp.GradScaler("cpu", init_scale=2.0))
        if step == BEGINS:
            kept["skipped"] = STEPS - BEGINS
        optimizer.zero_grad()
        scaler.scale(loss_of(model) * float("nan")).backward()
        scaler.step(optimizer)
        scaler.update()

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)

    def with_known(step: int, model: nn.Module, optimizer: SGD, kept: dict[str, Any]) -> None:
        if step >= BEGINS:
            kept.setdefault("scaler", scaler)
        happens(step, model, optimizer, kept)

    assert codes(with_known, scaler=scaler) == ["SL643"]
