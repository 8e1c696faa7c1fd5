"""The Trainer from outside: what it builds, refuses, leaves behind and gives back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import safeloop as sl

SGD = {"type": "SGD", "lr": 0.1}
OFF: dict[str, Any] = {"sinks": []}


class Fit(sl.Trainer):
    def loss(self, batch: Tensor) -> Tensor:
        return (self.model(batch) - batch.sum(1, keepdim=True)).square().mean()


def batches(n: int = 4) -> list[Tensor]:
    return list(torch.randn(n, 8, 3, generator=torch.Generator().manual_seed(1)))


def fit(model: nn.Module | None = None, cls: type[sl.Trainer] = Fit, **options: Any) -> sl.RunResult:
    options = {"data": batches(), "optimizers": SGD, "run": {"max_steps": 4}, "log": OFF, **options}
    return cls(model=model or nn.Linear(3, 1), **options).fit()


def test_keywords_win_over_the_file(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("run: {max_steps: 50, dir: nowhere}\noptimizers: {type: SGD, lr: 0.5}\n")
    trainer = Fit(config, model=nn.Linear(3, 1), data=batches(), run={"max_steps": 3}, log=OFF)
    assert trainer.fit().steps == 3
    assert trainer.config.optimizers is not None
    assert trainer.config.optimizers["main"].arguments() == {"lr": 0.5}


def test_without_sinks_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert fit().dir is None
    assert list(tmp_path.iterdir()) == []


def test_a_run_leaves_its_config_its_plan_its_metrics_and_its_weights(tmp_path: Path) -> None:
    run = {"max_steps": 4, "dir": str(tmp_path), "name": "small"}
    results = [fit(run=run, log={"sinks": ["jsonl"]}) for _ in range(2)]
    assert [result.dir and result.dir.name for result in results] == ["small", "small-2"]
    folder = results[0].dir
    assert folder is not None
    assert {file.name for file in folder.iterdir()} == {"config.yaml", "plan.txt", "metrics.jsonl", "model.safetensors"}
    assert "phase train x1" in (folder / "plan.txt").read_text()


def test_generators_end_the_run_early_with_a_warning() -> None:
    def once() -> Iterator[Tensor]:
        yield from batches(2)

    result = fit(data=once(), run={"max_steps": 10})
    assert (result.steps, result.outcome) == (2, "data ended")
    assert [fault.code for fault in result.faults] == ["SL854"]


def test_max_epochs_ends_the_run() -> None:
    result = fit(run={"max_epochs": 3})
    assert (result.steps, result.epochs, result.outcome) == (12, 3, "finished")


def test_a_lazy_layer_takes_its_shape_before_the_optimizer_is_built() -> None:
    model = nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.Linear(5, 1))
    result = fit(model)
    assert result.faults == ()
    assert model[0].weight.shape == (5, 3)


def test_a_model_left_in_eval_mode_is_trained_in_train_mode_and_single_modules_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    model[1].eval()
    mean = model[1].running_mean.clone()
    fit(model)
    assert not model[1].training
    assert torch.equal(model[1].running_mean, mean)
    model.eval()
    fit(model)
    assert model[1].training
    assert not torch.equal(model[1].running_mean, mean)


def test_ready_optimizers_are_used_as_they_are() -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.01)
    before = dict(optimizer.param_groups[0])
    fit(model, optimizers=optimizer)
    assert {k: v for k, v in optimizer.param_groups[0].items() if k != "params"} == {
        k: v for k, v in before.items() if k != "params"
    }
    assert len(optimizer.state) == 2


def test_evaluation_comes_every_n_steps_and_at_the_end(tmp_path: Path) -> None:
    class Measured(Fit):
        def metrics(self, batch: Tensor) -> dict[str, Tensor]:
            return {"error": (self.model(batch) - batch.sum(1, keepdim=True)).abs().flatten()}

    run = {"max_steps": 5, "dir": str(tmp_path)}
    result = fit(
        cls=Measured, eval_data=batches(2), evaluate={"every": 2, "loss": True}, run=run, log={"sinks": ["jsonl"]}
    )
    assert result.dir is not None
    lines = [json.loads(line) for line in (result.dir / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if line["kind"] == "eval"]
    assert [line["step"] for line in evaluated] == [2, 4, 5]
    assert {"metric/error", "loss/eval"} <= evaluated[0].keys()
    assert result.metrics["error"] == evaluated[-1]["metric/error"]


def test_an_exception_of_the_user_keeps_its_type_and_the_sinks_are_closed(tmp_path: Path) -> None:
    class Breaks(Fit):
        def loss(self, batch: Tensor) -> Tensor:
            if self.step == 2:
                raise ZeroDivisionError("mine")
            return super().loss(batch)

    with pytest.raises(ZeroDivisionError, match="mine"):
        fit(cls=Breaks, run={"max_steps": 5, "dir": str(tmp_path)}, log={"every": 1, "sinks": ["jsonl"]})
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_an_accepted_fault_lets_the_run_go_on() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    options = {"optimizers": {**SGD, "params": ["1.*"]}}
    with pytest.raises(sl.FaultError, match="SL201"):
        fit(model, **options)
    result = fit(model, **options, audit={"accept": {"SL201": ["0.*"]}})
    assert result.faults == ()


def test_skipped_updates_are_counted_and_bounded() -> None:
    data = batches(6)
    data[2][0, 0] = torch.nan
    model = nn.Linear(3, 1)
    result = fit(model, data=data, run={"max_steps": 6}, nonfinite={"policy": "skip", "max_consecutive": 1})
    assert result.steps == 6
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    bad = [torch.full_like(batch, torch.nan) for batch in data]
    with pytest.raises(sl.FaultError) as caught:
        fit(model, data=bad, run={"max_steps": 6}, nonfinite={"policy": "skip", "max_consecutive": 3})
    assert caught.value.fault.code == "SL602"
    assert "SL405" in {fault.code for fault in caught.value.others}


def test_losses_that_are_no_mapping_are_a_fault() -> None:
    class Tuple(sl.Trainer):
        def losses(self, batch: Tensor) -> Any:
            return self.model(batch).mean(), self.model(batch).square().mean()

    with pytest.raises(sl.FaultError) as caught:
        fit(cls=Tuple)
    assert caught.value.fault.code == "SL401"
    assert "tuple" in caught.value.fault.what


def test_the_plan_is_printed_explained_and_given_as_json() -> None:
    trainer = Fit(model=nn.Linear(3, 1), data=batches(), optimizers=SGD, run={"max_steps": 1}, log=OFF)
    plan = trainer.plan()
    assert [node["verb"] for node in json.loads(plan.json())["phases"][0]["nodes"]] == [
        "zero",
        "forward",
        "backward",
        "finite",
        "update",
    ]
    assert "why: " in plan.why()
    assert "why: " not in str(plan)
    assert trainer.step == 0


def test_a_user_frozen_by_pattern_gets_no_gradient_and_moves_no_bit() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    before = model[0].weight.clone()
    fit(model, frozen=["0.*"])
    assert torch.equal(model[0].weight, before)
    assert model[0].weight.grad is None
