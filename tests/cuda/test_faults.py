"""On CUDA, where autograd runs in a thread of its own: the same faults with the same lines, and no false ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import safeloop as sl
from safeloop.audit.budget import FIRST_STEPS

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).cuda()


def watched(loss_of: Callable[[nn.Module, Tensor], Tensor], steps: int = 8) -> tuple[sl.Fault, ...]:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of(model, torch.randn(16, 4, device="cuda")).backward()
            optimizer.step()
            audit.step()
    return tuple(audit.faults)


def line_of(function: Callable[..., Any], mark: str = "# here") -> str:
    lines, first = inspect.getsourcelines(function)
    return f"test_faults.py:{first + next(i for i, line in enumerate(lines) if mark in line)}"


def penalised(model: nn.Module, x: Tensor) -> Tensor:
    x.requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return model(x).square().mean() + (slope.norm(2, 1) - 1).square().mean()


def penalised_twice(model: nn.Module, x: Tensor) -> Tensor:
    x.requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    return F.mse_loss(model(x), x[:, :1]) + bend.square().mean()


def adapted(model: nn.Module, x: Tensor) -> Tensor:
    weights = dict(model.named_parameters())
    slopes = torch.autograd.grad(model(x).square().mean(), list(weights.values()), create_graph=True)
    fast = {name: w - 0.1 * slope for (name, w), slope in zip(weights.items(), slopes, strict=True)}
    return (torch.func.functional_call(model, fast, x) - 1).square().mean()


def by_func(model: nn.Module, x: Tensor) -> Tensor:
    slope = torch.func.vmap(torch.func.grad(lambda one: model(one).sum()))(x)
    return model(x).square().mean() + slope.square().mean()


@pytest.mark.parametrize("loss_of", [penalised, penalised_twice, adapted, by_func])
def test_a_graph_of_a_gradient_is_no_fault(loss_of: Callable[..., Tensor]) -> None:
    assert watched(loss_of, steps=FIRST_STEPS + 10) == ()


def without_graph(model: nn.Module, x: Tensor) -> Tensor:
    x.requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x)
    return model(x).square().mean() + (slope.norm(2, 1) - 1).square().mean()


def cut(model: nn.Module, x: Tensor) -> Tensor:
    hidden = torch.tensor(model[0](x).tolist(), device="cuda")  # here
    return model[2](hidden).square().mean()


def born_in_forward(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x).abs() * 0 - 1).log().mean()  # here


def born_in_backward(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) * 0).abs().sqrt().mean()  # here


def changed_behind(model: nn.Module, x: Tensor) -> Tensor:
    hidden = model[1](model[0](x))
    out = model[2](hidden)
    hidden.data.mul_(0.5)  # here
    return out.square().mean()


@pytest.mark.filterwarnings("ignore:Converting a tensor")
@pytest.mark.parametrize("loss_of", [cut, born_in_forward, born_in_backward, changed_behind])
def test_the_line_of_a_fault_in_a_loop_is_named(loss_of: Callable[..., Tensor]) -> None:
    told = "\n".join(map(str, watched(loss_of)))
    assert line_of(loss_of) in told, told


def test_a_penalty_without_a_graph_is_told() -> None:
    assert [fault.code for fault in watched(without_graph)] != []


class Penalised(sl.Trainer):
    def losses(self, batch: Tensor) -> dict[str, Any]:
        return {"fit": (self.model(batch) - 1).square().mean(), "gp": self.penalty(self.model, at=batch)}


@pytest.mark.parametrize("kind", ["gradient", "hessian_trace"])
def test_a_penalty_of_the_trainer_is_no_fault_and_watching_changes_no_bit(kind: str) -> None:
    runs = []
    for level in ("full", "standard", "off"):
        torch.manual_seed(0)
        run = Penalised(
            model=mlp(),
            data=[torch.randn(16, 4) for _ in range(4)],
            optimizers={"type": "Adam", "lr": 1e-3},
            penalties={"gp": {"type": kind}},
            run={"max_steps": 30, "device": "cuda", "seed": 3},
            audit={"level": level},
            log={"sinks": []},
        )
        assert run.fit().faults == ()
        runs.append(run.model)
    for model in runs[1:]:
        assert all(map(torch.equal, runs[0].parameters(), model.parameters()))


class Breaks(sl.Trainer):
    """The loss of the sixth batch has a gradient of NaN."""

    def loss(self, batch: Any) -> Tensor:
        out = self.model(batch["x"]) * batch["scale"]
        return out.square().sum(1).sqrt().mean()  # here


def breaking(device: str, folder: Path) -> Breaks:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
    data = [{"x": torch.randn(8, 4), "scale": torch.tensor(float(i != 5))} for i in range(8)]
    run = {"name": "breaks", "dir": str(folder), "max_steps": 8, "device": device}
    adamw = {"type": "AdamW", "lr": 1e-2}
    return Breaks(model=model, data=data, optimizers=adamw, run=run, log={"sinks": ["jsonl"]})


def test_a_step_that_is_not_finite_is_replayed_and_its_bundle_opens_on_both_devices(tmp_path: Path) -> None:
    run = breaking("cuda", tmp_path)
    with pytest.raises(sl.FaultError) as caught:
        run.fit()
    fault = caught.value.fault
    assert line_of(Breaks) in fault.where, str(fault)
    assert "SqrtBackward0" in fault.where
    assert "step 5" in fault.where
    assert all(bool(p.isfinite().all()) for p in run.model.parameters())
    bundle = tmp_path / "breaks/bundles/step-5"
    for device in ("cuda", "cpu"):
        again = sl.replay(bundle, breaking(device, tmp_path / device))
        assert "born in `SqrtBackward0`" in again.faults[0].where, str(again.faults[0])
        assert (again.note == "") or device == "cpu", again.note


def test_a_watched_loop_does_not_wait_after_the_first_iterations() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    data = [torch.randn(16, 4, device="cuda") for _ in range(FIRST_STEPS + 40)]
    try:
        with sl.audit(model=model, optimizers=optimizer, on_fault="collect", budget=0.0) as audit:
            for i, x in enumerate(data):
                torch.cuda.set_sync_debug_mode("error" if i >= FIRST_STEPS else "default")
                optimizer.zero_grad()
                F.mse_loss(model(x), x[:, :1]).backward()
                optimizer.step()
                audit.step()
            torch.cuda.set_sync_debug_mode("default")  # what is told at the end is looked at then
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert audit.faults == ()
