"""Penalties of runs without a line of Python, and what `safeloop check` says of the section."""

from __future__ import annotations

import copy
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import safeloop as sl
from safeloop.config import ConfigError, load
from safeloop.penalised import _replaced

OFF: dict[str, Any] = {"sinks": []}
CE = {"ce": {"type": "CrossEntropyLoss"}}
SMOOTH = {"type": "input_gradient", "of": "loss.ce", "at": "batch.0", "weight": 0.5}


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(6)]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def run_of(model: nn.Module, penalties: dict[str, Any], losses: dict[str, Any] = CE, **sections: Any) -> sl.Trainer:
    sections = {"run": {"max_steps": 4}, "log": OFF, "optimizers": {"type": "SGD", "lr": 0.1}, **sections}
    return sl.Trainer(model=model, data=batches(), losses=losses, penalties=penalties, **sections)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_of_torch_is_taken_apart_into_samples(reduction: str) -> None:
    model = net().double()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    data = [(x.double(), y) for x, y in batches()]
    for images, labels in data[:4]:
        optimizer.zero_grad()
        x = images.clone().requires_grad_()
        each = F.cross_entropy(plain(x), labels, reduction="none")
        (slope,) = torch.autograd.grad(each.sum(), x, create_graph=True)
        (getattr(each, reduction)() + 0.5 * slope.square().sum(1).mean() / 2).backward()
        optimizer.step()
    losses = {"ce": {"type": "CrossEntropyLoss", "reduction": reduction}}
    sgd = {"type": "SGD", "lr": 0.1}
    run = {"max_steps": 4}
    sl.Trainer(
        model=model, data=data, losses=losses, penalties={"smooth": SMOOTH}, optimizers=sgd, run=run, log=OFF
    ).fit()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


def test_micro_batches_with_a_penalty_of_a_mean_loss_equal_one_big_batch() -> None:
    data = [(x.double(), y) for x, y in batches()[:2]]
    big = [(torch.cat([data[0][0], data[1][0]]), torch.cat([data[0][1], data[1][1]]))]
    small, large = net().double(), net().double()
    shared: dict[str, Any] = {"losses": CE, "penalties": {"smooth": SMOOTH}, "log": OFF, "run": {"max_steps": 1}}
    shared["optimizers"] = {"type": "SGD", "lr": 0.1}
    sl.Trainer(model=small, data=data, accumulate={"micro_batches": 2}, **shared).fit()
    sl.Trainer(model=large, data=big, **shared).fit()
    for a, b in zip(small.parameters(), large.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize(
    "penalty",
    [
        {"type": "gradient", "of": "loss.ce", "at": "batch.0", "weight": 0.1, "every": 4},
        {"type": "jacobian", "of": "output", "at": "batch.0", "projections": 2},
        {"type": "output_jacobian", "of": "output", "at": "batch.0"},
        {"type": "spectral", "of": "output", "at": "batch.0"},
        {"type": "hessian_trace", "of": "loss.ce", "at": "batch.0"},
        {"type": "forces", "of": "output", "at": "batch.0", "targets": "batch.0"},
    ],
    ids=lambda penalty: penalty["type"],
)
def test_every_kind_of_declared_penalty_trains(penalty: dict[str, Any]) -> None:
    result = run_of(net(), {"smooth": penalty}).fit()
    assert result.faults == ()
    assert result.steps == 4


def test_an_output_of_several_is_named_by_its_path() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(x)}

    losses = {"ce": {"type": "CrossEntropyLoss", "inputs": ["output.logits", "batch.1"]}}
    penalty = {"type": "output_jacobian", "of": "output.logits", "at": "batch.0"}
    assert run_of(Heads(), {"p": penalty}, losses).fit().faults == ()


def test_the_plan_of_a_declared_run_names_its_penalty() -> None:
    text = str(run_of(net(), {"smooth": {**SMOOTH, "every": 4}}).plan())
    assert "ce + 0.5 smooth -> main" in text
    assert "smooth = 1/2 mean |grad|^2" in text
    assert "smooth is second order every 4 steps, times 4" in text


def test_the_batch_of_the_user_is_left_as_it_was() -> None:
    data = batches()
    sl.Trainer(
        model=net(),
        data=data,
        losses=CE,
        penalties={"smooth": SMOOTH},
        optimizers={"type": "SGD", "lr": 0.1},
        run={"max_steps": 6},
        log=OFF,
    ).fit()
    for (x, _), (wanted, _) in zip(data, batches(), strict=True):
        assert torch.equal(x, wanted)
        assert x.grad is None
        assert not x.requires_grad


def test_a_phase_computes_the_losses_and_penalties_that_it_lists() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    sgd = {"type": "SGD", "lr": 0.1}
    optimizers = {"body": {**sgd, "params": ["0.*"]}, "head": {**sgd, "params": ["2.*"]}}
    losses = {name: {"type": "CrossEntropyLoss"} for name in ("ce", "ce2")}
    phases = {
        "body_phase": {"trains": ["body"], "losses": ["ce", "smooth"]},
        "head_phase": {"trains": ["head"], "losses": ["ce2"]},
    }
    run = run_of(model, {"smooth": SMOOTH}, losses, optimizers=optimizers, phases=phases)
    text = str(run.plan())
    assert "ce + 0.5 smooth -> body" in text
    assert "ce2 -> head " in text
    assert run.fit().faults == ()


Pair = namedtuple("Pair", "x y")


class Holder:
    def __init__(self, x: Tensor) -> None:
        self.x = x


def test_a_leaf_is_put_into_a_copy_of_every_kind_of_batch() -> None:
    old, new = torch.zeros(2), torch.ones(2)
    nest = {"a": [(old, 1), Pair(old, 2)]}
    changed = _replaced(nest, ["a", "1", "x"], new)
    assert isinstance(changed["a"][1], Pair)
    assert changed["a"][1].x is new
    assert changed["a"][0] is nest["a"][0]
    assert nest["a"][1].x is old
    assert _replaced(old, [], new) is new
    assert _replaced({3: old}, ["3"], new) == {3: new}
    holder = Holder(old)
    assert _replaced(holder, ["x"], new).x is new
    assert holder.x is old


# ------------------------------------------------------------------------------------------------------- the section

HEAD = """
run: {max_steps: 100}
model: {target: "torch.nn:Linear", args: {in_features: 64, out_features: 10}}
data: {train: {target: "safeloop.datasets:Digits", args: {flat: true}}}
optimizers: {type: AdamW, lr: 1e-3}
losses: {ce: {type: CrossEntropyLoss}}
"""
CODE = HEAD.replace("losses: {ce: {type: CrossEntropyLoss}}", 'trainer: {target: "examples.gan:Gan"}')


def problem(tmp_path: Path, text: str) -> Any:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(path, environment={}, allow_modules=["examples"])
    (one,) = caught.value.problems
    assert one.at is not None
    assert one.at.line == len(text.splitlines())
    return one


@pytest.mark.parametrize(
    ("section", "code", "path", "help_"),
    [
        ("{p: {type: gradien, of: output, at: batch.0}}", "SL105", "penalties.p.type", "did you mean 'gradient'?"),
        (
            "{p: {type: gradient, traget: 1.0, of: output, at: batch.0}}",
            "SL101",
            "penalties.p.traget",
            "did you mean 'target'? accepted here: at, every, of, sided, target, trains, type, weight",
        ),
        ("{p: {of: output, at: batch.0}}", "SL102", "penalties.p.type", "add `type`"),
        ("{p: {type: r1, at: batch.0}}", "SL102", "penalties.p.of", "add `of: loss.NAME`"),
        ("{p: {type: r1, of: output}}", "SL102", "penalties.p.at", "add `at: batch.0`"),
        ("{p: {type: forces, of: output, at: batch.0}}", "SL102", "penalties.p.targets", "`targets: batch.1`"),
        ("{p: {type: r1, of: loss.cee, at: batch.0}}", "SL431", "penalties.p.of", "did you mean 'loss.ce'?"),
        ("{ce: {type: r1, of: loss.ce, at: batch.0}}", "SL431", "penalties.ce", "another name"),
        ("{p: {type: r1, of: losses.ce, at: batch.0}}", "SL119", "penalties.p.of", ""),
        ("{p: {type: r1, of: loss, at: batch.0}}", "SL119", "penalties.p.of", ""),
        ("{p: {type: r1, of: output, at: output}}", "SL119", "penalties.p.at", ""),
        ("{p: {type: r1, of: output, at: batch.0, every: 0}}", "SL104", "penalties.p.every", ""),
        ("{p: {type: gradient, of: output, at: batch.0, sided: both}}", "SL104", "penalties.p.sided", ""),
        ("{p: {type: r1, of: output, at: batch.0, weight: yes please}}", "SL103", "penalties.p.weight", ""),
    ],
)
def test_a_mistake_in_the_section_is_found_at_its_place(
    tmp_path: Path, section: str, code: str, path: str, help_: str
) -> None:
    found = problem(tmp_path, f"{HEAD.strip()}\npenalties: {section}")
    assert (found.fault.code, found.path) == (code, path)
    assert help_ in found.fault.fix


@pytest.mark.parametrize("key", ["of: output", "at: batch.0"])
def test_what_a_trainers_code_says_is_no_key_of_its_config(tmp_path: Path, key: str) -> None:
    found = problem(tmp_path, f"{CODE.strip()}\npenalties: {{gp: {{type: r1, {key}}}}}")
    assert found.fault.code == "SL431"
    assert "self.penalty" in found.fault.fix


def test_a_penalty_of_weight_zero_is_a_warning_and_one_that_grows_is_none(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"{CODE}\npenalties: {{gp: {{type: r1, weight: 0.0, every: 4}}}}", encoding="utf-8")
    (warning,) = load(path, environment={}, allow_modules=["examples"]).warnings
    assert (warning.code, warning.severity) == ("SL438", "warning")
    ramp = "{start: 0.0, end: 1.0, steps: 10}"
    path.write_text(f"{CODE}\npenalties: {{gp: {{type: r1, weight: {ramp}}}}}", encoding="utf-8")
    assert load(path, environment={}, allow_modules=["examples"]).warnings == []


def test_the_section_survives_being_written_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"{HEAD}\npenalties: {{p: {{type: gradient, target: 1, of: output, at: batch.0}}}}")
    first = load(path, environment={})
    path.write_text(first.text)
    assert load(path, environment={}).config == first.config
    assert first.config.penalties["p"].resolved()["sided"] == "two"
