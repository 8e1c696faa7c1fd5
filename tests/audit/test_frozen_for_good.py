"""Parameters that have trained for long and stay frozen after something else, beside plans to freeze them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Adam


def net() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 8), nn.Tanh()), "head": nn.Linear(8, 1)})


After = Callable[[nn.ModuleDict, int], Any]


def run(watched: Any, after: After, steps: int = 24) -> list[Any]:
    model = net()
    optimizer = Adam(model.parameters(), lr=1e-2)
    with watched(model, optimizer) as audit:
        for i in range(steps):
            optimizer.zero_grad()
            F.mse_loss(model["head"](model["body"](torch.randn(6, 4))), torch.randn(6, 1)).backward()
            optimizer.step()
            audit.step()
            after(model, i)
    return [(fault.code, fault.names) for fault in audit.faults]


BODY = ("body.0.bias", "body.0.weight")


def test_weights_exported_without_their_gradients(watched: Any) -> None:
    def export_body(model: nn.ModuleDict) -> bytes:
        for p in model["body"].parameters():
            p.requires_grad = False
        buffer = io.BytesIO()
        torch.save(model["body"].state_dict(), buffer)
        return buffer.getvalue()

    assert run(watched, lambda model, i: export_body(model) if i == 12 else None) == [("SL650", BODY)]


def test_a_validation_that_seeks_adversarial_inputs(watched: Any) -> None:
    class Fitter:
        def hook(self, model: nn.ModuleDict, i: int) -> None:
            if i % 13 == 12:
                self.validate(model)

        def validate(self, model: nn.ModuleDict) -> Any:
            self._only_inputs(model)
            x = torch.randn(6, 4, requires_grad=True)
            return torch.autograd.grad(model["head"](model["body"](x)).sum(), x)

        def _only_inputs(self, model: nn.ModuleDict) -> None:
            model["body"].requires_grad_(False)

    assert run(watched, Fitter().hook) == [("SL650", BODY)]


@contextlib.contextmanager
def still(module: nn.Module, *, is_late: bool) -> Iterator[None]:
    flags = [p.requires_grad for p in module.parameters()]
    for p in module.parameters():
        p.requires_grad = False
    if is_late:
        flags = [p.requires_grad for p in module.parameters()]
    yield
    for p, flag in zip(module.parameters(), flags, strict=True):
        p.requires_grad = flag


def _probe(model: nn.ModuleDict, i: int, *, is_late: bool) -> None:
    if i >= 11 and i % 3 == 0:
        with still(model["body"], is_late=is_late):
            x = torch.randn(6, 4, requires_grad=True)
            model["head"](model["body"](x)).sum().backward()
            model["head"].zero_grad()


def test_flags_that_are_noted_too_late(watched: Any) -> None:
    assert run(watched, lambda model, i: _probe(model, i, is_late=True)) == [("SL650", BODY)]


def _by_plan(model: nn.ModuleDict, i: int) -> None:
    if i >= 12:
        model["body"].requires_grad_(False)


def _at_two_lines(model: nn.ModuleDict, i: int) -> None:
    if i >= 12:
        model["body"].requires_grad_(False)
        model["head"](model["body"](torch.randn(6, 4))).mean().backward()
        model["body"].requires_grad_(False)


def _validation_that_restores(model: nn.ModuleDict, i: int) -> None:
    def validate() -> None:
        model["body"].requires_grad_(False)
        model["head"](model["body"](torch.randn(6, 4)))
        model["body"].requires_grad_(True)

    if i % 5 == 4:
        validate()


def _flags_noted_in_time(model: nn.ModuleDict, i: int) -> None:
    _probe(model, i, is_late=False)


def _a_callback_on_validation_end(model: nn.ModuleDict, i: int) -> None:
    def on_validation_end() -> None:
        model["body"].requires_grad_(False)

    if i == 12:
        on_validation_end()


def _an_evaluation_that_decides_to_freeze(model: nn.ModuleDict, i: int) -> None:
    def evaluate() -> None:
        def freeze_body() -> None:
            model["body"].requires_grad_(False)

        freeze_body()

    if i == 12:
        evaluate()


def _an_export_behind_the_training(model: nn.ModuleDict, i: int) -> None:
    def export() -> None:
        model.requires_grad_(False)

    if i == 23:
        export()


@pytest.mark.parametrize(
    "after",
    [
        _by_plan,
        _at_two_lines,
        _validation_that_restores,
        _flags_noted_in_time,
        _a_callback_on_validation_end,
        _an_evaluation_that_decides_to_freeze,
        _an_export_behind_the_training,
    ],
)
def test_no_fault_of(after: After, watched: Any) -> None:
    assert [fault for fault in run(watched, after) if fault[0] == "SL650"] == []
