"""The exact norm of each loss term's gradient over all parameters, every so many steps."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import safeloop as sl

OFF: dict[str, Any] = {"sinks": []}


class Heads(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 1), nn.Linear(5, 1)
        self.unused = nn.Linear(2, 2)
        self.to(dtype)

    def terms(self, x: Tensor) -> dict[str, Any]:
        hidden = self.trunk(x).tanh()
        a, b = self.a(hidden).to(x), self.b(hidden).to(x)
        return {"a": a.square().mean(), "b": (b - 1).square().mean()}


class Both(sl.Trainer):
    def losses(self, batch: Tensor) -> dict[str, Any]:
        return self.model.terms(batch)


def net(dtype: torch.dtype = torch.float64) -> Heads:
    torch.manual_seed(1)
    return Heads(dtype)


def batches(count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(4 + i % 2, 3, generator=generator, dtype=dtype) for i in range(count)]


def records(folder: Path | None) -> list[dict[str, Any]]:
    assert folder is not None
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("kind") == "train"]


def naive_norms(model: Heads, batch: Tensor, weights: dict[str, float]) -> dict[str, float]:
    """One backward for each term on a graph of its own."""
    norms = {}
    for name, weight in weights.items():
        model.zero_grad()
        (weight * model.terms(batch)[name]).backward()
        gradients = [p.grad.double() for p in model.parameters() if p.grad is not None]
        norms[name] = sum(gradient.square().sum().item() for gradient in gradients) ** 0.5
    model.zero_grad()
    return norms


def train(tmp_path: Path, model: nn.Module, data: list[Tensor], exact: int | None, **sections: Any) -> sl.RunResult:
    log = {"every": 1, "sinks": ["jsonl"], "exact_term_norms": None if exact is None else {"every": exact}}
    run = {"max_steps": len(data), "dir": str(tmp_path), **sections.pop("run", {})}
    losses = {"b": {"weight": -0.5}}
    sections = {"optimizers": {"type": "SGD", "lr": 0.1}, "losses": losses, "log": log, **sections}
    accepted = {"accept": {"SL502": ["unused.*"]}}  # a head that no term reaches
    return Both(model=model, data=data, run=run, audit=accepted, **sections).fit()


@pytest.mark.parametrize("every", [1, 2, 3])
def test_the_logged_norms_are_those_of_a_backward_for_each_term(tmp_path: Path, every: int) -> None:
    data = batches(6)
    lines = records(train(tmp_path, net(), data, every).dir)
    oracle = net()
    optimizer = torch.optim.SGD(oracle.parameters(), lr=0.1)
    for step, (batch, line) in enumerate(zip(data, lines, strict=True)):
        if (step + 1) % every == 0:
            for name, norm in naive_norms(oracle, batch, {"a": 1.0, "b": -0.5}).items():
                assert line[f"loss_grad_exact/{name}"] == pytest.approx(norm, rel=1e-6)
        else:
            assert not [tag for tag in line if tag.startswith("loss_grad_exact/")]
        optimizer.zero_grad()
        terms = oracle.terms(batch)
        (terms["a"] - 0.5 * terms["b"]).backward()
        optimizer.step()


def test_a_record_has_the_latest_norms_since_the_one_before(tmp_path: Path) -> None:
    data = batches(6)
    every_step = records(train(tmp_path, net(), data, 1).dir)
    log = {"every": 3, "sinks": ["jsonl"], "exact_term_norms": {"every": 2}}
    sparse = records(train(tmp_path, net(), data, None, log=log).dir)
    tags = ("loss_grad_exact/a", "loss_grad_exact/b")
    assert [line["step"] for line in sparse] == [3, 6]
    assert [sparse[0][tag] for tag in tags] == [every_step[1][tag] for tag in tags]
    assert [sparse[1][tag] for tag in tags] == [every_step[5][tag] for tag in tags]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_measuring_changes_no_bit_of_gradients_weights_or_random_state(tmp_path: Path, precision: str) -> None:
    def run(exact: int | None) -> tuple[list[Tensor], list[Tensor], Any]:
        model = net(torch.float32)
        torch.manual_seed(3)
        train(tmp_path, model, batches(4, torch.float32), exact, run={"precision": precision})
        state = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate())
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return [p.detach() for p in model.parameters()], gradients, state

    weights, gradients, state = run(1)
    quiet_weights, quiet_gradients, quiet_state = run(None)
    assert all(map(torch.equal, weights, quiet_weights))
    assert len(gradients) == len(quiet_gradients) == 6
    assert all(map(torch.equal, gradients, quiet_gradients))
    assert state == quiet_state


def test_a_backward_that_draws_random_numbers_draws_the_same_ones_when_watched(tmp_path: Path) -> None:
    class Noise(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient + torch.randn_like(gradient)

    class Noisy(Heads):
        def terms(self, x: Tensor) -> dict[str, Any]:
            return {name: Noise.apply(term) for name, term in super().terms(x).items()}

    def run(exact: int | None) -> list[Tensor]:
        torch.manual_seed(1)
        model = Noisy()
        train(tmp_path, model, batches(2), exact)
        return [p.detach() for p in model.parameters()]

    assert all(map(torch.equal, run(1), run(None)))


def test_in_fp16_the_norms_are_without_the_gradient_scale(tmp_path: Path) -> None:
    data = batches(1, torch.float32)
    line = records(train(tmp_path, net(torch.float32), data, 1, run={"precision": "fp16"}).dir)[0]
    for name, norm in naive_norms(net(torch.float32), data[0], {"a": 1.0, "b": -0.5}).items():
        assert line[f"loss_grad_exact/{name}"] == pytest.approx(norm, rel=2e-2)


def test_of_a_window_the_norms_are_those_of_one_big_batch(tmp_path: Path) -> None:
    data = batches(3)
    accumulate = {"micro_batches": 3}
    line = records(train(tmp_path, net(), data, 1, accumulate=accumulate, run={"max_steps": 1}).dir)[0]
    for name, norm in naive_norms(net(), torch.cat(data), {"a": 1.0, "b": -0.5}).items():
        assert line[f"loss_grad_exact/{name}"] == pytest.approx(norm, rel=1e-6)


def test_a_phase_measures_its_own_terms_over_what_it_trains(tmp_path: Path) -> None:
    class Phased(sl.Trainer):
        @sl.phase(trains="left")
        def first(self, batch: Tensor) -> dict[str, Tensor]:
            return {"a": self.model.terms(batch)["a"]}

        @sl.phase(trains="right")
        def second(self, batch: Tensor) -> dict[str, Tensor]:
            return {"b": self.model.terms(batch)["b"], "b2": self.model.terms(batch)["b"] * 2}

    data = batches(2)
    left = {"type": "SGD", "lr": 1e-12, "params": ["trunk.*", "a.*"]}
    right = {"type": "SGD", "lr": 1e-12, "params": "rest"}
    log = {"every": 1, "sinks": ["jsonl"], "exact_term_norms": {"every": 1}}
    run = {"max_steps": 1, "dir": str(tmp_path)}
    result = Phased(model=net(), data=data, optimizers={"left": left, "right": right}, run=run, log=log).fit()
    line = records(result.dir)[0]
    assert line["loss_grad_exact/a"] == pytest.approx(naive_norms(net(), data[0], {"a": 1.0})["a"], rel=1e-6)
    model = net()
    model.terms(data[1])["b"].backward()
    alone = torch.cat([p.grad.flatten() for p in model.b.parameters()]).norm().item()
    assert line["loss_grad_exact/b"] == pytest.approx(alone, rel=1e-6)
    assert line["loss_grad_exact/b2"] == pytest.approx(2 * alone, rel=1e-6)


def test_in_a_simultaneous_step_a_norm_is_over_what_its_term_trains(tmp_path: Path) -> None:
    losses = {"a": {"trains": ["trunk.*", "a.*"]}, "b": {"trains": ["b.*"]}}
    log = {"every": 1, "sinks": ["jsonl"], "exact_term_norms": {"every": 1}}
    run = {"max_steps": 1, "dir": str(tmp_path)}
    data, model = batches(1), net()
    sgd = {"type": "SGD", "lr": 0.1}
    trainer = Both(model=net(), data=data, optimizers=sgd, losses=losses, run=run, log=log, simultaneous=True)
    assert "every step one pass more for each term" in str(trainer.plan())
    line = records(trainer.fit().dir)[0]
    assert line["loss_grad_exact/a"] == pytest.approx(naive_norms(net(), data[0], {"a": 1.0})["a"], rel=1e-6)
    model.terms(data[0])["b"].backward()
    alone = torch.cat([p.grad.flatten() for p in model.b.parameters()]).norm().item()
    assert line["loss_grad_exact/b"] == pytest.approx(alone, rel=1e-6)


def test_weighted_tensors_constants_and_sparse_gradients_are_measured_too(tmp_path: Path) -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(6, 3, sparse=True)

    class Run(sl.Trainer):
        def losses(self, batch: Tensor) -> dict[str, Any]:
            rows = self.model.table(batch).square().sum(1)
            return {"rows": (rows, torch.ones_like(rows) / 2), "sum": rows.sum(), "still": torch.ones(())}

    torch.manual_seed(0)
    model = Embedded()
    index = torch.tensor([1, 1, 4])
    table = model.table.weight.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(table[index].square().sum(), table)
    log = {"every": 1, "sinks": ["jsonl"], "exact_term_norms": {"every": 1}}
    run = {"max_steps": 1, "dir": str(tmp_path)}
    losses = {"still": {"may_be_constant": True}}
    sgd = {"type": "SGD", "lr": 0.1, "fused": False}
    result = Run(model=model, data=[index], optimizers=sgd, losses=losses, run=run, log=log).fit()
    line = records(result.dir)[0]
    assert line["loss_grad_exact/sum"] == pytest.approx(expected.norm().item(), rel=1e-6)
    assert line["loss_grad_exact/rows"] == pytest.approx(expected.norm().item() / 2, rel=1e-6)
    assert "loss_grad_exact/still" not in line


def test_lbfgs_measures_within_its_closure(tmp_path: Path) -> None:
    sections = {"optimizers": {"type": "LBFGS", "lr": 0.1, "max_iter": 1}, "losses": {}}
    data = batches(1)
    line = records(train(tmp_path, net(), data, 1, **sections).dir)[0]
    for name, norm in naive_norms(net(), data[0], {"a": 1.0, "b": 1.0}).items():
        assert line[f"loss_grad_exact/{name}"] == pytest.approx(norm, rel=1e-6)


@settings(max_examples=15, deadline=None)
@given(scale=st.floats(1e-3, 1e3))
def test_a_norm_scales_with_the_weight_of_its_term(tmp_path_factory: pytest.TempPathFactory, scale: float) -> None:
    folder, data = tmp_path_factory.mktemp("scale"), batches(1)
    once = records(train(folder, net(), data, 1, losses={"b": {"weight": 1.0}}).dir)[0]
    often = records(train(folder, net(), data, 1, losses={"b": {"weight": scale}}).dir)[0]
    assert often["loss_grad_exact/b"] == pytest.approx(scale * once["loss_grad_exact/b"], rel=1e-6)
    assert often["loss_grad_exact/a"] == pytest.approx(once["loss_grad_exact/a"], rel=1e-6)


def test_the_plan_says_what_it_costs() -> None:
    log = {"sinks": [], "exact_term_norms": {"every": 50}}
    trainer = Both(model=net(), data=batches(1), optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}, log=log)
    text = str(trainer.plan())
    assert "every 50 steps one pass more for each term" in text
    quiet = Both(model=net(), data=batches(1), optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}, log=OFF)
    assert "pass more" not in str(quiet.plan())


@pytest.mark.parametrize("value", [{"every": 0}, {}, 50, {"every": 2, "at": "cut"}])
def test_a_period_that_is_none_is_refused(value: Any) -> None:
    log = {"sinks": [], "exact_term_norms": value}
    with pytest.raises(sl.FaultError, match="SL10"):
        Both(model=net(), data=batches(1), optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}, log=log)
