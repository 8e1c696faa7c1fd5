"""Curvature readings of a run: against the Hessian, on a schedule, and bitwise without influence."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import safeloop as sl

STEPS = {"optimizers": {"type": "SGD", "lr": 0.05}, "data": [torch.tensor([[1.0, 2.0], [3.0, -1.0]])]}


class Weighted(sl.Trainer):
    """Two terms over a linear model: the Hessian is constant, `2 X^T X / N` and 3 times the identity."""

    def losses(self, batch):
        return {"fit": self.model(batch).square().mean(), "decay": 0.5 * self.model.weight.square().sum()}


def records(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{"step": line["step"], **line.get("scalars", line)} for line in lines]


def test_the_readings_are_those_of_the_hessian_on_their_schedule(tmp_path):
    curvature = {"every": 4, "products": 8}
    Weighted(
        model=nn.Linear(2, 1, bias=False),
        losses={"decay": {"weight": 3.0}},
        run={"max_steps": 10, "device": "cpu", "dir": str(tmp_path), "name": "c"},
        log={"every": 3, "sinks": ["jsonl"], "curvature": curvature},
        **STEPS,
    ).fit()
    x = STEPS["data"][0]
    values = torch.linalg.eigvalsh(2 * x.T @ x / 2 + 3 * torch.eye(2))
    read = {one["step"]: one for one in records(tmp_path / "c") if "curvature/train/trace" in one}
    assert list(read) == [6, 9]  # the logs next after steps 4 and 8
    for one in read.values():
        assert one["curvature/train/top_eigenvalue"] == pytest.approx(float(values[-1]), rel=1e-3)
        assert one["curvature/train/trace"] == pytest.approx(float(values.sum()), rel=0.5)


def test_reading_changes_no_bit():
    class Noisy(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    results = []
    for curvature in (None, {"every": 1}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
        log = {"every": 1, "sinks": [], "curvature": curvature}
        Noisy(model=model, run={"max_steps": 4, "device": "cpu"}, log=log, **STEPS).fit()
        results.append((model.state_dict(), torch.get_rng_state()))
    (first, random_first), (second, random_second) = results
    assert all(map(torch.equal, first.values(), second.values()))
    assert torch.equal(random_first, random_second)


def test_the_plan_says_what_it_costs():
    trainer = Weighted(
        model=nn.Linear(2, 1), run={"max_steps": 1, "device": "cpu"}, log={"curvature": {"every": 500}}, **STEPS
    )
    assert "curvature: top_eigenvalue, trace every 500 steps, about 42 gradients each time" in str(trainer.plan())


def test_each_phase_has_its_own():
    class Two(sl.Trainer):
        @sl.phase(trains="a")
        def first(self, batch):
            return {"one": 2 * (self.model[0](batch) ** 2).sum()}

        @sl.phase(trains="b")
        def second(self, batch):
            return {"two": (self.model[1](batch) ** 2).sum()}

    model = nn.ModuleList([nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)])
    optimizers = {n: {"type": "SGD", "lr": 0.01, "params": [f"{i}.*"]} for i, n in enumerate("ab")}
    trainer = Two(
        model=model,
        optimizers=optimizers,
        data=STEPS["data"],
        run={"max_steps": 1, "device": "cpu"},
        log={"sinks": [], "every": 1, "curvature": {"every": 1, "of": ["top_eigenvalue"]}},
    )
    trainer.fit()
    found = trainer._curvature.at(10, trainer._assembly)
    x = STEPS["data"][0]
    top = float(torch.linalg.eigvalsh(2 * x.T @ x)[-1])
    assert found == pytest.approx(
        {"curvature/first/top_eigenvalue": 2 * top, "curvature/second/top_eigenvalue": top}, rel=1e-3
    )
