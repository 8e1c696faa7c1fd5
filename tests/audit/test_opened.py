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
    assert fault.names == ("held['meters']['loss'].sum",)
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
