"""Weights that follow the gradients: against the rule written out, at both places, and where they stay."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import safeloop as sl
from safeloop.optim.balancing import BalanceSpec


class Two(sl.Trainer):
    """Two terms that share a hidden layer; the second has 100 times the gradient."""

    def losses(self, batch: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.model[0](batch))
        return {"small": self.model[1](hidden).square().mean(), "large": 100 * self.model[2](hidden).square().mean()}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(4, 1)]).double()


def batch() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(8, 3).double()


def fit(model: nn.Module, kind: type[sl.Trainer] = Two, **sections) -> sl.Trainer:
    run = {"max_steps": 1, "device": "cpu", **sections.pop("run", {})}
    given = {"optimizers": {"type": "SGD", "lr": 0.01, "fused": False}, "log": {"sinks": []}, **sections}
    trainer = kind(model=model, data=[batch()], run=run, **given)
    trainer.fit()
    return trainer


def terms(model: nn.Module) -> list[Tensor]:
    hidden = torch.tanh(model[0](batch()))
    return [model[1](hidden).square().mean(), 100 * model[2](hidden).square().mean()]


def norm(gradients) -> Tensor:
    return torch.stack([g.norm() for g in gradients if g is not None]).norm()


def test_a_loop_by_hand_at_the_parameters():
    model, by_hand = net(), net()
    losses = {"small": {"weight": 2.0}, "large": {"weight": 1.0}}
    balance = {"every": 2, "rate": 0.3}
    trainer = fit(model, losses=losses, balance=balance, run={"max_steps": 6})
    weights, wanted = [2.0, 1.0], [2.0, 1.0]
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.01)
    for step in range(6):
        optimizer.zero_grad()
        values = terms(by_hand)
        parameters = list(by_hand.parameters())
        sizes = [float(norm(torch.autograd.grad(v, parameters, retain_graph=True, allow_unused=True))) for v in values]
        torch.autograd.backward(values, [torch.tensor(w).double() for w in weights])
        optimizer.step()
        if (step + 1) % 2 == 0:
            mean = sum(sizes) / 2
            weights = [0.7 * w + 0.3 * c * mean / n for w, c, n in zip(weights, wanted, sizes, strict=True)]
    found = [trainer._assembly.weights[name] for name in ("small", "large")]
    assert found == pytest.approx(weights, rel=1e-6)  # norms of mixed lists are float32
    for a, b in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_at_the_cut_the_weighted_norms_become_equal_there():
    model = net()
    trainer = fit(model, balance={"every": 1, "rate": 1.0, "at": "cut"}, optimizers={"type": "SGD", "lr": 0.0})
    hidden = torch.tanh(model[0](batch()))
    values = [model[1](hidden).square().mean(), 100 * model[2](hidden).square().mean()]
    norms = [float(torch.autograd.grad(v, hidden, retain_graph=True)[0].norm()) for v in values]
    weighted = [trainer._assembly.weights[n] * size for n, size in zip(("small", "large"), norms, strict=True)]
    assert weighted == pytest.approx([sum(norms) / 2] * 2, rel=1e-6)


@given(
    st.dictionaries(st.sampled_from("abcd"), st.floats(1e-3, 1e3), min_size=1),
    st.floats(0.01, 1.0),
    st.floats(1e-6, 1e6),
)
@settings(deadline=None)
def test_the_rule_is_blind_to_the_scale_of_all_gradients_and_fixed_at_equal_ones(sizes, rate, factor):
    spec = BalanceSpec(rate=rate)
    ones = dict.fromkeys(sizes, 1.0)
    once = spec.adjusted(ones, ones, sizes)
    again = spec.adjusted(ones, ones, {n: factor * s for n, s in sizes.items()})
    assert once == pytest.approx(again)
    assert spec.adjusted(ones, ones, dict.fromkeys(sizes, factor)) == pytest.approx(ones)


def test_the_limit_holds_and_what_has_no_gradient_keeps_its_weight():
    spec = BalanceSpec(rate=1.0, limit=10.0)
    new = spec.adjusted({"a": 1.0, "b": 1.0, "c": 4.0}, {"a": 1.0, "b": 1.0, "c": 4.0}, {"a": 1e9, "b": 1e-9, "c": 0.0})
    assert new == pytest.approx({"a": 0.5, "b": 10.0})
    assert spec.adjusted({"a": 1.0}, {"a": 1.0}, {"a": 0.0}) == {}


def test_a_ramped_weight_is_left_to_its_ramp():
    ramp = {"start": 0.5, "end": 1.0, "steps": 10}
    trainer = fit(net(), losses={"large": {"weight": ramp}, "small": {}}, balance={"every": 1}, run={"max_steps": 3})
    assert trainer._assembly.weights["large"] == pytest.approx(0.6)


def test_lbfgs_leaves_the_weights_as_the_stage_before_left_them():
    sgd = {"type": "SGD", "lr": 0.01}
    stages = {
        "a": {"max_steps": 2, "optimizers": sgd},
        "b": {"max_steps": 2, "optimizers": {"type": "LBFGS", "max_iter": 2}},
    }
    balance = {"every": 1, "rate": 0.5}
    trainer = fit(net(), stages=stages, balance=balance, optimizers=None, run={"max_steps": None})
    first = fit(net(), balance=balance, optimizers={"type": "SGD", "lr": 0.01}, run={"max_steps": 2})
    assert dict(trainer._assembly.weights) == pytest.approx(dict(first._assembly.weights))
    lines = str(trainer.plan()).split("stage b")
    assert "balance" in lines[0]
    assert "balance" not in lines[1]


def test_the_weights_are_logged_and_the_plan_says_what_they_cost(tmp_path):
    run = {"max_steps": 4, "dir": str(tmp_path), "name": "b"}
    trainer = fit(net(), balance={"every": 2}, run=run, log={"sinks": ["jsonl"], "every": 2})
    lines = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    last = [line.get("scalars", line) for line in lines if "loss_weight/large" in line.get("scalars", line)][-1]
    assert last["loss_weight/large"] == pytest.approx(trainer._assembly.weights["large"])
    assert "every 2 steps, by norms at the parameters: one pass more for each term" in str(trainer.plan())


@pytest.mark.parametrize(
    "section", [{"combine": {"type": "pcgrad", "at": "cut"}}, {"simultaneous": True}], ids=["combine", "simultaneous"]
)
def test_what_cannot_be_measured_is_refused(section):
    if "simultaneous" in section:
        section["losses"] = {"small": {"trains": ["1.*"]}, "large": {"trains": ["2.*", "0.*"]}}
    with pytest.raises(sl.FaultError, match="SL626"):
        fit(net(), balance={"at": "cut"}, **section)
