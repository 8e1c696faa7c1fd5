"""Readings: what is logged is what was measured, and it moves from the device once per interval."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import safeloop as sl
from safeloop.optim.owner import Owner
from safeloop.readings import MAX_MODULES, Readings
from safeloop.step.report import StepReport


class Fit(sl.Trainer):
    def loss(self, batch: Tensor) -> Tensor:
        return (self.model(batch) - 1).square().mean()


def logged(tmp_path: Path, model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    data = list(torch.randn(8, 6, 3, generator=torch.Generator().manual_seed(1)))
    options = {"optimizers": {"type": "SGD", "lr": 0.1}, "log": {"every": 4, "sinks": ["jsonl"]}, **options}
    result = Fit(model=model, data=data, run={"max_steps": 8, "dir": str(tmp_path)}, **options).fit()
    assert result.dir is not None
    lines = [json.loads(line) for line in (result.dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def plain_norms(max_norm: float | None) -> tuple[list[float], list[dict[str, float]]]:
    """The gradient norm of each step and of each module, by a loop written here."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    norms, modules = [], []
    for x in torch.randn(8, 6, 3, generator=torch.Generator().manual_seed(1)):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        modules.append({i: math.hypot(*(p.grad.norm().item() for p in model[int(i)].parameters())) for i in "02"})
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf)))
        optimizer.step()
    return norms, modules


@pytest.mark.parametrize("max_norm", [None, 0.6])
def test_norms_are_those_of_the_plain_loop(tmp_path: Path, max_norm: float | None) -> None:
    norms, modules = plain_norms(max_norm)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    lines = logged(tmp_path, model, optimizers={"type": "SGD", "lr": 0.1, "max_norm": max_norm})
    for line, last in zip(lines, (3, 7), strict=True):
        interval = norms[last - 3 : last + 1]
        assert line["grad/main/pre_clip"] == pytest.approx(norms[last], rel=1e-6)
        assert line["grad/main/max_since_last"] == pytest.approx(max(interval), rel=1e-6)
        assert line["grad/main/log10_pre_clip"] == pytest.approx(math.log10(norms[last]), rel=1e-5)
        assert line["grad/main/post_clip"] == pytest.approx(min(norms[last], max_norm or math.inf), rel=1e-5)
        if max_norm is not None:
            assert line["grad/main/clip_fraction"] == sum(norm > max_norm for norm in interval) / 4
        for name, norm in modules[last].items():
            assert line[f"module/grad_norm/{name}"] == pytest.approx(norm, rel=1e-5)


def test_above_a_number_of_modules_they_are_grouped_by_their_top_level_child(tmp_path: Path) -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.Sequential(*[nn.Linear(3, 3) for _ in range(MAX_MODULES)])
            self.right = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.right(self.left(x))

    line = logged(tmp_path, Deep())[0]
    names = {tag for tag in line if tag.startswith("module/grad_norm/")}
    assert names == {"module/grad_norm/left", "module/grad_norm/right"}


def test_what_is_not_wanted_is_not_logged(tmp_path: Path) -> None:
    log = {"every": 4, "sinks": ["jsonl"], "grad_norms": ["total"]}
    line = logged(tmp_path, nn.Linear(3, 1), log=log)[0]
    assert {tag for tag in line if tag.startswith(("grad/", "module/"))} == {
        "grad/total/pre_clip",
        "grad/total/post_clip",
        "grad/total/log10_pre_clip",
    }


def test_readings_on_the_device_pile_up_there() -> None:
    """As a deferred gate leaves them: tensors, never looked at before `take`."""
    parameter = nn.Parameter(torch.zeros(3))
    owner = Owner("main", torch.optim.SGD([parameter], lr=0.1), {"w": parameter})
    readings = Readings({"main": owner}, {})
    readings.resume(0)
    for step, norm in enumerate((1.0, 3.0, 2.0)):
        report = StepReport(step, terms={"fit": torch.tensor(float(step))}, norms={"main": torch.tensor(norm)})
        readings.add(report)
    readings.pause(30)
    scalars = readings.take(report)
    assert (scalars["grad/main/pre_clip"], scalars["grad/main/max_since_last"]) == (2.0, 3.0)
    assert scalars["loss/train"] == scalars["loss/fit"] == 2.0
    assert scalars["perf/samples_per_s"] > 0
