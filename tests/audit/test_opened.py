"""Graphs that an object of the user's keeps: a meter, a memory bank, one in a dict; and objects that keep none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import safeloop as sl


class Meter:
    """A running mean, as in many training scripts."""

    def __init__(self) -> None:
        self.sum: Any = 0.0
        self.count = 0

    def __call__(self, value: Any) -> None:
        self.sum = self.sum + value  # guilty
        self.count += 1


@dataclass
class Bank:
    """A list of past features."""

    items: list[Tensor] = field(default_factory=list)

    def __call__(self, value: Tensor) -> None:
        self.items.append(value)


def run(keep: Callable[[Tensor], Any], detach: bool = False, **held: Any) -> tuple[Any, ...]:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    mine = held  # a local variable of the loop
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(9):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 4)).square().mean()
            loss.backward()
            optimizer.step()
            keep(loss.detach() if detach else loss)
            audit.step()
    assert mine is held
    return audit.faults


@pytest.mark.parametrize(("make", "name"), [(Meter, "keep.sum"), (Bank, "keep.items")])
def test_what_an_object_keeps_is_named_by_its_attribute(make: Callable[[], Any], name: str) -> None:
    assert [(fault.code, fault.names) for fault in run(make())] == [("SL311", (name,))]
    assert not run(make(), detach=True)


def test_the_line_that_made_the_value_is_told() -> None:
    meters: dict[str, Meter] = defaultdict(Meter)
    (fault,) = run(lambda loss: meters["loss"](loss), meters=meters)
    assert fault.names == ("meters['loss'].sum",)  # the lambda's own variable
    assert "# guilty" in fault.where


def test_an_object_that_holds_itself_ends() -> None:
    meter = Meter()
    meter.own = meter  # type: ignore[attr-defined]
    assert run(meter, meter=meter)[0].code == "SL311"


def test_a_buffer_that_keeps_graphs_is_named() -> None:
    model = nn.Linear(4, 1)
    model.register_buffer("average", torch.zeros(1))

    def keep(loss: Tensor) -> None:
        model.average = 0.9 * model.average + 0.1 * loss

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(9):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 4)).square().mean()
            loss.backward()
            optimizer.step()
            keep(loss)
            audit.step()
    assert [(fault.code, fault.names) for fault in audit.faults] == [("SL311", ("average",))]


HISTORY: list[Tensor] = []


def keep_globally(loss: Tensor) -> None:
    HISTORY.append(loss)


def run_with_global(detach: bool) -> tuple[Any, ...]:
    HISTORY.clear()
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(9):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 4)).square().mean()
            loss.backward()
            optimizer.step()
            keep_globally(loss.detach() if detach else loss)
            audit.step()
    return audit.faults


def test_a_global_that_a_helper_appends_to_is_named() -> None:
    assert [(fault.code, fault.names) for fault in run_with_global(False)] == [("SL311", ("HISTORY",))]
    assert not run_with_global(True)


class Centered:
    """A loss function that keeps a running centre of what it has seen."""

    def __init__(self, detach: bool) -> None:
        self.center: Any = torch.zeros(4)
        self.detach = detach

    def __call__(self, model: nn.Module, batch: Tensor) -> Tensor:
        out = model(batch)
        loss = (out - self.center.detach()).square().mean()
        self.center = 0.9 * self.center + 0.1 * (out.detach() if self.detach else out).mean(0)
        return loss


def closure(detach: bool) -> Callable[[nn.Module, Tensor], Tensor]:
    seen: list[Tensor] = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        value = model(batch).square().mean()
        seen.append(value.detach() if detach else value)
        return value

    return loss


def fit(function: Callable[[nn.Module, Tensor], Tensor], run_dir: Any) -> tuple[Any, ...]:
    case = {"loss": function}

    class Run(sl.Trainer):
        def loss(self, batch: Tensor) -> Tensor:
            return case["loss"](self.model, batch)

    sgd = {"type": "SGD", "lr": 0.01}
    options: dict[str, Any] = {"run": {"dir": run_dir, "max_steps": 9}, "log": {"sinks": []}}
    trainer = Run(model=nn.Linear(4, 4), data=[torch.randn(8, 4)] * 9, optimizers=sgd, **options)
    try:
        trainer.fit()
    except sl.FaultError as error:
        return (error.fault,)
    return tuple(trainer.faults)


@pytest.mark.parametrize(("make", "name"), [(Centered, "case['loss'].center"), (closure, "seen")])
def test_what_a_trainers_loss_function_keeps_is_named(make: Callable[[bool], Any], name: str, tmp_path: Any) -> None:
    assert [(fault.code, fault.names) for fault in fit(make(False), tmp_path / "bad")] == [("SL311", (name,))]
    assert not fit(make(True), tmp_path / "good")
