"""Around what torch.compile runs there is no tape: nothing is traced twice, and no graph breaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import safeloop as sl


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


def loop(step: Any, model: nn.Module, steps: int = 4) -> sl.Audit:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect", level="full") as audit:
        for _ in range(steps):
            optimizer.zero_grad()
            step(torch.randn(8, 6)).backward()
            optimizer.step()
            audit.step()
    return audit


@pytest.mark.parametrize("what", ["function", "model", "part", "in place"])
def test_a_compiled_program_is_traced_once(what: str) -> None:
    counters.clear()
    model = Net()
    compiled: dict[str, Any] = {"backend": "eager", "fullgraph": True}

    def step(x: Tensor) -> Tensor:
        return F.mse_loss(run(x), x[:, :1])

    run: Any = model
    if what == "function":
        step = torch.compile(step, **compiled)
    elif what == "model":
        run = torch.compile(model, **compiled)
    elif what == "part":
        model.first = torch.compile(model.first, **compiled)
    else:
        model.compile(**compiled)
    assert loop(step, model).faults == ()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_without_compiled_functions_the_tape_is_on() -> None:
    model = nn.Linear(6, 1)
    audit = loop(lambda x: (model(x) - x.sum(1)).square().mean(), model)
    assert [fault.code for fault in audit.faults] == ["SL420"]
