"""Gradient norms inside the forward: the numbers of lessons row 22, no leak, no change, no sync between logs."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch
from torch import Tensor, nn

import safeloop as sl


def scalars(folder) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line.get("scalars", line) for line in lines]


def fit(kind: type[sl.Trainer], model: nn.Module, tmp_path=None, **sections) -> sl.Trainer:
    log = {"every": 1, "sinks": ["jsonl"] if tmp_path else [], **sections.pop("log", {})}
    run = {"max_steps": 1, "device": "cpu", "name": "w", **({"dir": str(tmp_path)} if tmp_path else {})}
    run |= sections.pop("run", {})
    given = {"optimizers": {"type": "SGD", "lr": 0.1}, "data": [torch.ones(2, 2)], **sections}
    trainer = kind(model=model, run=run, log=log, **given)
    trainer.fit()
    return trainer


class Ones(nn.Module):
    """x of the lesson, as a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones(2, 2))


class Lesson(sl.Trainer):
    """out = mean(3 (x + 2)^2): x.grad 4.5, y.grad 4.5, z.grad 0.25, out.grad 1 in every entry."""

    def loss(self, batch: Tensor) -> Tensor:
        x = self.watch("x", self.model.x)
        y = self.watch("y", x + 2)
        z = self.watch("z", 3 * y * y)
        return self.watch("out", z.mean())


def test_the_gradients_of_intermediate_values_of_row_22(tmp_path):
    fit(Lesson, Ones(), tmp_path)
    found = {tag: value for tag, value in scalars(tmp_path / "w")[0].items() if tag.startswith("watch/")}
    norms = {"watch/x": 4.5 * 2, "watch/y": 4.5 * 2, "watch/z": 0.25 * 2, "watch/out": 1.0}  # of four equal entries
    assert found == pytest.approx(norms)


class Square(sl.Trainer):
    def loss(self, batch: Tensor) -> Tensor:
        return self.model(batch).square().mean()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), nn.Linear(4, 1))


def test_the_norm_at_a_modules_output_is_that_of_its_retained_gradient(tmp_path):
    fit(Square, net(), tmp_path, log={"watch": ["0", "1.*"]})
    found = {tag: value for tag, value in scalars(tmp_path / "w")[0].items() if tag.startswith("watch/")}
    by_hand = net()
    first = by_hand[0](torch.ones(2, 2))
    inner = by_hand[1][0](first)
    relu = torch.relu(inner)
    gradients = torch.autograd.grad(by_hand[2](relu).square().mean(), [first, inner, relu])
    expected = dict(zip(("watch/0", "watch/1.0", "watch/1.1"), (float(g.norm()) for g in gradients), strict=True))
    assert found == pytest.approx(expected)


def test_accumulation_adds_up_and_a_repeated_phase_keeps_its_last_turn(tmp_path):
    batches = [torch.full((2, 2), float(i + 1)) for i in range(2)]
    fit(Square, net(), tmp_path, data=batches, accumulate={"micro_batches": 2}, log={"watch": ["0"]})
    by_hand = net()
    out = by_hand[0](torch.cat(batches))
    (gradient,) = torch.autograd.grad(by_hand[2](by_hand[1](out)).square().mean(), out)
    assert scalars(tmp_path / "w")[0]["watch/0"] == pytest.approx(float(gradient.norm()), rel=1e-5)

    class Twice(sl.Trainer):
        @sl.phase(trains="main", repeat=2)
        def both(self, batch):
            return {"value": self.watch("value", self.model(batch)).sum()}

    fit(Twice, net(), tmp_path, run={"name": "twice"})
    assert scalars(tmp_path / "twice")[0]["watch/value"] == pytest.approx(2**0.5)


def test_it_works_in_a_custom_step_and_with_lbfgs(tmp_path):
    class Custom(sl.Trainer):
        def custom_step(self, ops, batch):
            ops.zero()
            ops.backward({"value": self.watch("value", self.model(batch)).sum()})
            ops.update()

    fit(Custom, net(), tmp_path, run={"name": "custom"})
    assert scalars(tmp_path / "custom")[0]["watch/value"] == pytest.approx(2**0.5)
    fit(Square, net(), tmp_path, run={"name": "closure"}, optimizers={"type": "LBFGS"}, log={"watch": ["0"]})
    assert scalars(tmp_path / "closure")[0]["watch/0"] >= 0


def test_watching_changes_no_bit():
    seen, states = [], []
    for log in ({}, {"watch": ["*"]}):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
        fit(Square, model, log=log, run={"max_steps": 5}, data=[torch.randn(6, 2) for _ in range(3)])
        seen.append(model)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert all(map(torch.equal, seen[0].state_dict().values(), seen[1].state_dict().values()))


def test_nothing_of_the_graph_is_kept_and_hooks_are_set_only_on_steps_that_log():
    kept: list[weakref.ref] = []
    hooked: list[bool] = []

    class Keep(sl.Trainer):
        def loss(self, batch):
            hidden = self.watch("hidden", self.model(batch))
            kept.append(weakref.ref(hidden))
            hooked.append(bool(hidden._backward_hooks))
            return hidden.square().mean()

    trainer = fit(Keep, net(), log={"every": 3, "watch": ["0"]}, run={"max_steps": 6})
    gc.collect()
    assert [one() for one in kept] == [None] * 6
    assert hooked == [False, False, True, False, False, True]
    assert not any(module._forward_hooks for module in trainer.model.modules())
    assert trainer._assembly.watch._open is None


def test_watch_outside_of_a_forward_does_nothing():
    trainer = Square(model=net(), data=[torch.ones(2, 2)], optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1})
    x = torch.ones(2, requires_grad=True)
    assert trainer.watch("x", x) is x
    trainer.check()
    trainer.watch("x", x)
    assert x._backward_hooks is None


def test_what_cannot_be_watched_is_refused_before_the_first_step():
    with pytest.raises(sl.FaultError, match="SL447") as caught:
        fit(Square, net(), log={"watch": ["encoder.*"]})
    assert "matches none of 5 modules" in caught.value.fault.what
    with pytest.raises(sl.FaultError, match="beside"):
        fit(Square, net(), log={"watch": ["0"]}, run={"compile": {"backend": "eager"}})
