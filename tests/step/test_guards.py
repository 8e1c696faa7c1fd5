"""What a loss function must leave to the loop: the gradients of earlier micro-batches, and the optimizer's step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import safeloop as sl

OFF: dict[str, Any] = {"sinks": []}
FUSED = {"type": "AdamW", "lr": 0.01, "fused": True}
PLAIN = {"type": "AdamW", "lr": 0.01, "fused": False}
SGD = {"type": "SGD", "lr": 0.1}
LBFGS = {"type": "LBFGS", "lr": 0.1, "max_iter": 2}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def trainer(compute: Any, optimizers: Any = SGD, model: nn.Module | None = None, **sections: Any) -> sl.Trainer:
    class Run(sl.Trainer):
        def loss(self, batch: Tensor) -> Tensor:
            return compute(self, batch)

    data = list(torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(1)))
    sections = {"run": {"max_steps": 3}, "log": OFF, **sections}
    return Run(model=model or net(), data=data, optimizers=optimizers, **sections)


def fit(run: sl.Trainer, batch: Tensor) -> Tensor:
    return run.model(batch).square().mean()


def fault_of(run: sl.Trainer) -> sl.Fault:
    before = copy.deepcopy(run.model.state_dict())
    with pytest.raises(sl.FaultError) as caught:
        run.fit()
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())
    return caught.value.fault


# ---------------------------------------------------------------------------------- gradients that are not left alone

WINDOW: dict[str, Any] = {"accumulate": {"micro_batches": 3}}
DISTURBERS: dict[str, Any] = {
    "model.zero_grad()": lambda run: run.model.zero_grad(),
    "zero_grad(set_to_none=False)": lambda run: run.model.zero_grad(set_to_none=False),
    "zero_grad of one layer": lambda run: run.model[2].zero_grad(),
    ".grad = None": lambda run: setattr(run.model[0].bias, "grad", None),
    ".grad replaced": lambda run: setattr(run.model[0].bias, "grad", torch.zeros(4)),
    ".grad.zero_()": lambda run: run.model[2].weight.grad.zero_() if run.model[2].weight.grad is not None else None,
    "clip_grad_norm_": lambda run: torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-6),
    "loss.backward()": lambda run: fit(run, torch.ones(2, 3)).backward(),
}


@pytest.mark.parametrize("optimizers", [SGD, LBFGS], ids=["SGD", "LBFGS"])
@pytest.mark.parametrize("what", DISTURBERS)
def test_gradients_of_earlier_micro_batches_cannot_be_dropped(what: str, optimizers: dict[str, Any]) -> None:
    def compute(run: sl.Trainer, batch: Tensor) -> Tensor:
        DISTURBERS[what](run)
        return fit(run, batch)

    fault = fault_of(trainer(compute, optimizers, audit={"level": "off"}, **WINDOW))
    assert fault.code == "SL617"
    assert "test_guards.py" in fault.where


@pytest.mark.parametrize("step", [0, 25])
def test_it_is_seen_on_every_step(step: int) -> None:
    def compute(run: sl.Trainer, batch: Tensor) -> Tensor:
        if run.step == step:
            run.model.zero_grad()
        return fit(run, batch)

    with pytest.raises(sl.FaultError, match="SL617"):
        trainer(compute, run={"max_steps": 30}, **WINDOW).fit()


def test_a_backward_pass_of_the_users_own_is_refused_without_accumulation_too() -> None:
    def compute(run: sl.Trainer, batch: Tensor) -> Tensor:
        loss = fit(run, batch)
        loss.backward(retain_graph=True)
        return loss

    fault = fault_of(trainer(compute))
    assert fault.code == "SL617"
    assert "`0.weight`" in fault.what
    assert fault.names == ("0.weight", "0.bias", "2.weight", "2.bias")


def test_zero_grad_where_there_is_nothing_to_lose_is_no_error() -> None:
    def compute(run: sl.Trainer, batch: Tensor) -> Tensor:
        run.model.zero_grad()
        return fit(run, batch)

    assert trainer(compute).fit().faults == ()


@pytest.mark.parametrize("optimizers", [SGD, FUSED, LBFGS], ids=["SGD", "AdamW", "LBFGS"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_undisturbed_window_is_no_error(optimizers: dict[str, Any], precision: str) -> None:
    def compute(run: sl.Trainer, batch: Tensor) -> Tensor:
        inputs = batch.clone().requires_grad_()
        (slope,) = torch.autograd.grad(fit(run, inputs), inputs)
        return fit(run, batch) + slope.detach().square().mean()

    run = {"max_steps": 4, "precision": precision}
    assert trainer(compute, optimizers, run=run, **WINDOW).fit().faults == ()


def test_an_embedding_with_sparse_gradients_accumulates() -> None:
    class Run(sl.Trainer):
        def loss(self, batch: Tensor) -> Tensor:
            return self.model(batch).square().mean()

    data = [torch.tensor([0, 1]), torch.tensor([1, 2]), torch.tensor([2, 2])]
    model = nn.Embedding(4, 2, sparse=True)
    optimizers = {"type": "SparseAdam", "lr": 0.1}
    assert (
        Run(model=model, data=data, optimizers=optimizers, run={"max_steps": 2}, log=OFF, **WINDOW).fit().faults == ()
    )


def test_accepting_it_lets_the_run_go_on() -> None:
    def compute(run: sl.Trainer, batch: Tensor) -> Tensor:
        run.model.zero_grad()
        return fit(run, batch)

    assert trainer(compute, audit={"accept": {"SL617": ["*"]}}, **WINDOW).fit().faults == ()


# ------------------------------------------------------------------------------------------ a step of the user's own

SCHEDULED = {**FUSED, "scheduler": {"type": "StepLR", "step_size": 1}}
MOMENTUM = {"type": "SGD", "lr": 0.1, "momentum": 0.9, "fused": True}


@pytest.mark.parametrize("late", [0, 2])
@pytest.mark.parametrize("optimizers", [FUSED, PLAIN, SCHEDULED, MOMENTUM], ids=["fused", "plain", "scheduled", "SGD"])
def test_a_step_in_a_loss_function_is_refused(optimizers: dict[str, Any], late: int) -> None:
    weights: list[Tensor] = []

    def compute(run: sl.Trainer, batch: Tensor) -> Tensor:
        loss = fit(run, batch)
        weights.append(run.model[0].weight.detach().clone())
        if run.step == late:
            run._assembled().owners["main"].optimizer.step()
        return loss

    run = trainer(compute, optimizers, run={"max_steps": 4}, audit={"level": "off"})
    with pytest.raises(sl.FaultError) as caught:
        run.fit()
    fault = caught.value.fault
    assert fault.code == "SL618"
    assert fault.names == ("main",)
    assert "test_guards.py" in fault.where
    assert "optimizer.step()" in fault.where
    assert torch.equal(run.model[0].weight, weights[-1]), "refused before a weight has changed"


def test_a_step_of_a_ready_optimizer_is_refused_while_the_run_lasts_and_no_longer() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def compute(run: sl.Trainer, batch: Tensor) -> Tensor:
        optimizer.step()
        return fit(run, batch)

    assert fault_of(trainer(compute, optimizer, model)).code == "SL618"
    assert not optimizer._optimizer_step_pre_hooks
    optimizer.step()
    assert trainer(fit, optimizer, model).fit().faults == ()
    assert not optimizer._optimizer_step_pre_hooks


def test_a_step_in_metrics_is_refused() -> None:
    class Run(sl.Trainer):
        def loss(self, batch: Tensor) -> Tensor:
            return fit(self, batch)

        def metrics(self, batch: Tensor) -> dict[str, Tensor]:
            self._assembled().owners["main"].optimizer.step()
            return {"value": fit(self, batch)}

    data = [torch.ones(2, 3)]
    run = Run(model=net(), data=data, eval_data=data, optimizers=FUSED, run={"max_steps": 1}, log=OFF)
    with pytest.raises(sl.FaultError, match="SL618"):
        run.fit()


def test_a_custom_step_updates_through_its_operations_alone() -> None:
    class Run(sl.Trainer):
        own = False

        def custom_step(self, ops: Any, batch: Tensor) -> None:
            ops.zero()
            ops.backward({"value": fit(self, batch)})
            if self.own:
                self._assembled().owners["main"].optimizer.step()
            ops.update()

    def make(cls: type[sl.Trainer]) -> sl.Trainer:
        return cls(model=net(), data=[torch.ones(2, 3)], optimizers=FUSED, run={"max_steps": 2}, log=OFF)

    assert make(Run).fit().faults == ()
    with pytest.raises(sl.FaultError) as caught:
        make(type("Own", (Run,), {"own": True})).fit()
    assert caught.value.fault.code == "SL618"
    assert "ops.update" in caught.value.fault.fix


def test_an_optimizer_of_the_users_that_the_loop_does_not_own_may_step() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()
            self.register_buffer("offset", torch.zeros(1))

    offset = torch.zeros(1, requires_grad=True)
    other = torch.optim.SGD([offset], lr=0.1)

    def compute(run: sl.Trainer, batch: Tensor) -> Tensor:
        other.zero_grad()
        offset.grad = torch.ones(1)
        other.step()
        return run.model.body(batch).square().mean()

    assert trainer(compute, FUSED, Net()).fit().faults == ()
    assert offset.item() == pytest.approx(-0.3)


def test_watching_leaves_the_direct_path_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    hooked = torch.optim.AdamW.step

    def counted(self: Optimizer, closure: Any = None) -> Any:
        calls.append(1)
        return hooked(self, closure)

    run = trainer(fit, FUSED, run={"max_steps": 6})
    assert run._assembled().owners["main"].direct is not None
    counted.hooked = True  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    assert run.fit().steps == 6
    assert len(calls) == 1, "the first step alone, which makes the state"
