"""A run in stages: loops by hand as the oracle, what goes on and what starts anew, what is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn

import safeloop as sl
from safeloop.config import ConfigError, load
from safeloop.plan.stages import StagedPlan

ADAM = {"type": "Adam", "lr": 1e-2, "fused": False}
LBFGS = {"type": "LBFGS", "lr": 1.0, "max_iter": 4, "line_search_fn": "strong_wolfe"}


class Fit(sl.Trainer):
    def loss(self, batch):
        x, y = batch
        return (self.model(x) - y).square().mean()

    def metrics(self, batch):
        x, y = batch
        return {"error": (self.model(x) - y).abs().flatten()}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).double()


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(20, 3).double(), torch.randn(20, 1).double()


def fit(stages: dict, model: nn.Module | None = None, kind: type[sl.Trainer] = Fit, **sections) -> sl.Trainer:
    run = {"device": "cpu", **sections.pop("run", {})}
    given = {"data": [batch()], "log": {"sinks": []}, **sections}
    trainer = kind(model=model or net(), stages=stages, run=run, **given)
    trainer.result = trainer.fit()
    return trainer


def by_hand(model: nn.Module, adam_steps: int, lbfgs_steps: int) -> None:
    x, y = batch()
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(adam_steps):
        adam.zero_grad()
        (model(x) - y).square().mean().backward()
        adam.step()
    lbfgs = torch.optim.LBFGS(model.parameters(), lr=1.0, max_iter=4, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        lbfgs.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    for _ in range(lbfgs_steps):
        lbfgs.step(closure)


def test_adam_then_lbfgs_are_the_loops_by_hand():
    model, expected = net(), net()
    trainer = fit(
        {"explore": {"max_steps": 7, "optimizers": ADAM}, "polish": {"max_steps": 3, "optimizers": LBFGS}}, model
    )
    by_hand(expected, 7, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert (trainer.result.steps, trainer.result.outcome, trainer.result.faults) == (10, "finished", ())


def test_a_single_stage_is_a_run_without_stages():
    staged, plain = net(), net()
    fit({"only": {"max_steps": 5, "optimizers": ADAM}}, staged)
    Fit(model=plain, data=[batch()], optimizers=ADAM, run={"max_steps": 5, "device": "cpu"}, log={"sinks": []}).fit()
    assert all(torch.equal(a, b) for a, b in zip(staged.parameters(), plain.parameters(), strict=True))


def test_schedules_start_with_their_stage():
    scheduler = {"type": "StepLR", "step_size": 2, "gamma": 0.5}
    seen = []

    class Watch(Fit):
        def loss(self, batch):
            seen.append(self._assembly.owners["main"].optimizer.param_groups[0]["lr"])
            return super().loss(batch)

    stage = {"max_steps": 4, "optimizers": {"type": "SGD", "lr": 0.1, "scheduler": scheduler}}
    fit({"one": stage, "two": stage}, kind=Watch)
    assert seen[-8:] == pytest.approx([0.1, 0.1, 0.05, 0.05] * 2)


def test_schedules_by_epochs_count_those_of_their_stage():
    scheduler = {"type": "StepLR", "step_size": 1, "gamma": 0.5, "per": "epoch"}
    seen = []

    class Watch(Fit):
        def loss(self, batch):
            seen.append(self._assembly.owners["main"].optimizer.param_groups[0]["lr"])
            return super().loss(batch)

    stage = {"max_steps": 4, "optimizers": {"type": "SGD", "lr": 0.1, "scheduler": scheduler}}
    fit({"one": stage, "two": stage}, kind=Watch, data=[batch(), batch()])
    assert seen[-8:] == pytest.approx([0.1, 0.1, 0.05, 0.05] * 2)


def test_steps_logs_and_evaluations_go_on(tmp_path):
    stages = {
        "explore": {"max_steps": 5, "optimizers": {"first": ADAM}},
        "polish": {"max_steps": 3, "optimizers": {"second": LBFGS}},
    }
    trainer = fit(
        stages,
        run={"dir": str(tmp_path), "name": "staged"},
        log={"sinks": ["jsonl"], "every": 2},
        evaluate={"every": 4},
        eval_data=[batch()],
    )
    lines = [json.loads(line) for line in (tmp_path / "staged" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss/train" in line.get("scalars", line)]
    assert [line["step"] for line in trained] == [2, 4, 5, 6, 8]  # the last step of a stage is written too
    owners = ["first" if "grad/first/pre_clip" in line.get("scalars", line) else "second" for line in trained]
    assert owners == ["first"] * 3 + ["second"] * 2
    evaluated = [line["step"] for line in lines if "metric/error" in line.get("scalars", line)]
    assert evaluated == [4, 8]
    assert trainer.result.steps == 8
    plan = (tmp_path / "staged" / "plan.txt").read_text()
    assert "stage explore   steps 1 to 5" in plan
    assert "stage polish   steps 6 to 8" in plan


def test_the_first_owners_let_their_memory_go():
    trainer = fit({"explore": {"max_steps": 3, "optimizers": ADAM}, "polish": {"max_steps": 1, "optimizers": LBFGS}})
    first, last = (stage.assembly.owners["main"].optimizer for stage in trainer._stages)
    assert not first.state
    assert last.state


def test_the_plan_shows_every_stage_and_is_json_too():
    stages = {"explore": {"max_steps": 1500, "optimizers": ADAM}, "polish": {"max_steps": 20, "optimizers": LBFGS}}
    plan = Fit(model=net(), data=[batch()], stages=stages, run={"device": "cpu"}).plan()
    assert isinstance(plan, StagedPlan)
    text = str(plan)
    assert text.index("stage explore   steps 1 to 1,500") < text.index("stage polish   steps 1,501 to 1,520")
    assert "main  Adam" in text
    assert "up to 5 evaluations" in text
    assert "why:" in plan.why()
    shown = json.loads(plan.json())["stages"]
    assert [(one["stage"], one["steps"], one["phases"][0]["phase"]) for one in shown] == [
        ("explore", 1500, "train"),
        ("polish", 20, "train"),
    ]


def test_max_steps_of_the_run_ends_it_within_a_stage():
    stages = {"explore": {"max_steps": 5, "optimizers": ADAM}, "polish": {"max_steps": 5, "optimizers": LBFGS}}
    assert fit(stages, run={"max_steps": 7}).result.steps == 7
    trainer = fit(stages, run={"max_steps": 3})
    assert (trainer.result.steps, trainer.result.outcome) == (3, "finished")
    assert "stage polish   never reached: `run.max_steps` is 3" in str(trainer.plan())


def test_a_non_finite_gradient_in_the_second_stage_changes_nothing():
    class Break(Fit):
        def loss(self, batch):
            return super().loss(batch) * (math.nan if self.step >= 3 else 1.0)

    model, expected = net(), net()
    trainer = Break(
        model=model,
        data=[batch()],
        stages={"a": {"max_steps": 3, "optimizers": ADAM}, "b": {"max_steps": 3, "optimizers": ADAM}},
        run={"device": "cpu"},
        log={"sinks": []},
    )
    with pytest.raises(sl.FaultError, match="SL501"):
        trainer.fit()
    by_hand(expected, 3, 0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_averages_and_ramps_go_on_from_stage_to_stage():
    stage = {"max_steps": 4, "optimizers": {"type": "SGD", "lr": 0.1}}

    class Two(sl.Trainer):
        def losses(self, batch):
            return {"fit": (self.model(batch[0]) - batch[1]).square().mean()}

    staged, plain = net(), net()
    more = {
        "losses": {"fit": {"weight": {"start": 0.0, "end": 1.0, "steps": 8}}},
        "average": {"type": "ema", "decay": 0.9},
    }
    a = fit({"one": stage, "two": stage}, staged, kind=Two, **more)
    b = Two(
        model=plain,
        data=[batch()],
        optimizers=stage["optimizers"],
        run={"max_steps": 8, "device": "cpu"},
        log={"sinks": []},
        **more,
    )
    b.fit()
    assert all(map(torch.equal, staged.parameters(), plain.parameters()))
    assert all(map(torch.equal, a.averaged_model.parameters(), b.averaged_model.parameters()))


TOP = "run: {name: x}\nmodel: {target: 'torch.nn:Linear', args: {in_features: 64, out_features: 10}}\n" + (
    "data: {train: {target: 'safeloop.datasets:Digits', args: {flat: true}}}\nlosses: {ce: {type: CrossEntropyLoss}}\n"
)


@pytest.mark.parametrize(
    ("text", "code", "path"),
    [
        ("stages: {a: {max_steps: 5, optimizers: {type: Adam, lr: -1.0}}}", "SL104", "stages.a.optimizers.main.lr"),
        ("stages: {a: {max_steps: 5, optimizers: {type: SGD, lr: 1, nesterov: true}}}", "SL114", None),
        ("stages: {a: {max_steps: 5, optimizers: {type: Adam, lrr: 1.0}}}", "SL101", "stages.a.optimizers.main.lrr"),
        ("stages: {a: {max_steps: 0, optimizers: {type: Adam}}}", "SL104", "stages.a.max_steps"),
        ("stages: {a: {optimizers: {type: Adam}}}", "SL102", "stages.a.max_steps"),
        ("stages: {a: {max_steps: 5}}", "SL102", "stages.a.optimizers"),
        (
            "stages: {a: {max_steps: 5, optimizers: {type: Adam}}}\noptimizers: {type: SGD, lr: 1}",
            "SL625",
            "optimizers",
        ),
        ("stages: {a: {max_steps: 5, optimizers: {type: Adam, max_norm: 1, clip_value: 1}}}", "SL120", None),
    ],
)
def test_what_is_wrong_with_a_stage_is_said_at_its_place(tmp_path, text: str, code: str, path: str | None):
    file = tmp_path / "c.yaml"
    file.write_text(TOP + text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(file, environment={})
    (problem,) = caught.value.problems
    assert problem.fault.code == code
    assert problem.path == path if path else problem.path.startswith("stages.a.optimizers.main")


def test_a_warning_of_a_stage_has_its_place_and_comes_once(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(TOP + "stages: {a: {max_steps: 5, optimizers: {type: Adam, lr: 0.0}}}", encoding="utf-8")
    (warning,) = load(file, environment={}).warnings
    assert "stages.a.optimizers.main.lr" in warning.where


def test_an_override_reaches_into_a_stage(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(TOP + "stages: {a: {max_steps: 5, optimizers: {type: Adam, lr: 1e-3}}}", encoding="utf-8")
    for path in ("stages.a.optimizers.lr=0.5", "stages.a.optimizers.main.lr=0.5"):
        loaded = load(file, environment={}, overrides=[path, "stages.a.max_steps=2"])
        assert loaded.config.stages["a"].optimizers["main"].lr == 0.5
        assert loaded.config.max_steps == 2


def test_a_pattern_that_matches_nothing_is_found_before_the_first_stage():
    stages = {
        "a": {"max_steps": 1, "optimizers": {"type": "SGD", "lr": 0.1}},
        "b": {"max_steps": 1, "optimizers": {"x": {**ADAM, "params": ["nowhere.*"]}, "y": {**ADAM, "params": "rest"}}},
    }
    with pytest.raises(sl.FaultError, match="SL203") as caught:
        fit(stages)
    assert "stages.b.optimizers.x.params" in caught.value.fault.where


def test_ready_optimizers_and_stages_are_refused():
    model = net()
    with pytest.raises(ConfigError, match="SL625"):
        Fit(
            model=model,
            data=[batch()],
            optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
            stages={"a": {"max_steps": 1, "optimizers": ADAM}},
            run={"max_steps": 1},
        )
