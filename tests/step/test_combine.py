"""Conflict-aware combination of the terms' gradients, against a second implementation that keeps the Jacobian."""

from __future__ import annotations

import json
import random
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import safeloop as sl
from safeloop.autograd.conflict import HiddenPath, backward_at_cut, backward_at_parameters
from safeloop.autograd.cut import shared_cut

pytest.importorskip("torchjd", reason='pip install "safeloop[multitask]"')

OFF: dict[str, Any] = {"sinks": []}
SGD = {"type": "SGD", "lr": 1.0}


def two_pcgrad(jacobian: Tensor) -> Tensor:
    a, b = jacobian
    dot = torch.dot(a, b).clamp(max=0.0)
    return (a - dot / b.square().sum() * b) + (b - dot / a.square().sum() * a)


def two_mgda(jacobian: Tensor) -> Tensor:
    a, b = jacobian
    part = (torch.dot(b - a, b) / (a - b).square().sum()).clamp(0.0, 1.0)
    return part * a + (1 - part) * b


def by_torchjd(name: str, **arguments: Any) -> Callable[[Tensor], Tensor]:
    def combine(jacobian: Tensor) -> Tensor:
        if name == "CAGrad":
            pytest.importorskip("cvxpy", reason='pip install "safeloop[multitask,cagrad]"')
        import torchjd.aggregation

        return getattr(torchjd.aggregation, name)(**arguments)(jacobian)

    return combine


RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "upgrad": by_torchjd("UPGrad"),
    "pcgrad": two_pcgrad,
    "mgda": two_mgda,
    "cagrad": by_torchjd("CAGrad", c=0.5),
}


class Heads(nn.Module):
    """Two heads on a trunk; `unused` takes no part."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.trunk, self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 1), nn.Linear(5, 1)
        self.unused = nn.Linear(2, 2)
        self.double()

    def features(self, x: Tensor) -> list[Tensor]:
        return [self.trunk(x).tanh()]

    def read(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        (hidden,) = features
        return {"a": self.a(hidden).square().mean(), "b": (self.b(hidden) - 1).square().mean()}


class Pair(Heads):
    """Two cut tensors of two nodes."""

    def features(self, x: Tensor) -> list[Tensor]:
        hidden = self.trunk(x)
        return [hidden.tanh(), hidden.sin()]

    def read(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        left, right = features
        a, b = self.a(left * right), self.b(left * right)  # two products: one would be the only cut tensor
        return {"a": a.square().mean() + left.mean(), "b": (b - 1).square().mean() + right.square().sum()}


class Nested(Pair):
    """The second cut tensor is made from the first."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.middle = nn.Linear(5, 5).double()

    def features(self, x: Tensor) -> list[Tensor]:
        hidden = self.trunk(x).tanh()
        return [hidden, self.middle(hidden).tanh()]


class Halves(Pair):
    """Two cut tensors of one node."""

    def features(self, x: Tensor) -> list[Tensor]:
        return list(torch.unbind(torch.stack([self.trunk(x).tanh(), self.trunk(x).sin()])))


class Run(sl.Trainer):
    def losses(self, batch: Tensor) -> dict[str, Any]:
        return self.model.read(self.model.features(batch))


def data(count: int = 1, seed: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 3, generator=generator, dtype=torch.float64) for _ in range(count)]


def train(model: nn.Module, combine: Any, trainer: type[sl.Trainer] = Run, **sections: Any) -> sl.RunResult:
    batches = sections.pop("data", data())
    run = {"max_steps": len(batches), **sections.pop("run", {})}
    losses = {"b": {"weight": 0.7}}
    sections = {"optimizers": SGD, "losses": losses, "log": OFF, **sections}
    return trainer(model=model, data=batches, combine=combine, run=run, **sections).fit()


def weighted(model: Heads, features: Sequence[Tensor]) -> list[Tensor]:
    terms = model.read(features)
    return [terms["a"], 0.7 * terms["b"]]


def flat(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if t is None else t).flatten() for t, p in zip(tensors, like, strict=True)])


def moved(before: nn.Module, after: nn.Module) -> Tensor:
    """What SGD with lr 1 subtracted: the gradient."""
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    return torch.cat([(x - y).detach().flatten() for x, y in pairs])


def naive_at_parameters(model: Heads, batch: Tensor, rule: Callable[[Tensor], Tensor]) -> Tensor:
    parameters = list(model.parameters())
    rows = []
    for k in range(2):
        term = weighted(model, model.features(batch))[k]
        rows.append(flat(torch.autograd.grad(term, parameters, allow_unused=True), parameters))
    return rule(torch.stack(rows))


def naive_at_cut(model: Heads, batch: Tensor, rule: Callable[[Tensor], Tensor]) -> Tensor:
    """Heads get their own gradient, the trunk that of the combined features."""
    parameters = list(model.parameters())
    features = model.features(batch)
    leaves = [feature.detach().requires_grad_() for feature in features]
    terms = weighted(model, leaves)
    rows = [flat(torch.autograd.grad(term, leaves, retain_graph=True, allow_unused=True), leaves) for term in terms]
    combined = rule(torch.stack(rows)).split([leaf.numel() for leaf in leaves])
    above = torch.autograd.grad(sum(terms), parameters, allow_unused=True)
    seeds = [part.view_as(leaf) for part, leaf in zip(combined, leaves, strict=True)]
    below = torch.autograd.grad(features, parameters, seeds, allow_unused=True)
    return flat(above, parameters) + flat(below, parameters)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(4))
def test_at_the_parameters_the_gradient_is_the_rule_of_the_jacobian(rule: str, seed: int) -> None:
    model, oracle = Heads(seed), Heads(seed)
    expected = naive_at_parameters(oracle, data()[0], RULES[rule])
    train(model, {"type": rule})
    torch.testing.assert_close(moved(oracle, model), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", [Heads, Pair, Nested, Halves])
def test_at_the_cut_the_trunk_gets_the_rule_of_the_features_gradients(rule: str, kind: type[Heads]) -> None:
    for seed in range(3):
        model, oracle = kind(seed), kind(seed)
        expected = naive_at_cut(oracle, data()[0], RULES[rule])
        train(model, {"type": rule, "at": "cut"})
        torch.testing.assert_close(moved(oracle, model), expected, rtol=1e-9, atol=1e-10)


def test_the_cases_above_have_the_cuts_that_they_are_named_for_and_meet_conflict() -> None:
    def cut(model: Heads) -> tuple[int, int]:
        edges = shared_cut(list(model.read(model.features(data()[0])).values())).edges
        return len(edges), len({node for node, _ in edges})

    assert [cut(kind()) for kind in (Heads, Pair, Nested, Halves)] == [(1, 1), (2, 2), (2, 2), (2, 1)]
    differing = 0
    for seed in range(4):
        differing += not torch.allclose(
            naive_at_parameters(Heads(seed), data()[0], two_pcgrad),
            naive_at_parameters(Heads(seed), data()[0], lambda jacobian: jacobian.sum(0)),
        )
    assert differing


@pytest.mark.parametrize(("rule", "factor"), [("upgrad", 0.5), ("pcgrad", 1.0), ("mgda", 0.5), ("cagrad", 0.75)])
@pytest.mark.parametrize("at", ["parameters", "cut"])
def test_identical_terms_give_the_mean_or_sum_that_the_rule_says(rule: str, factor: float, at: str) -> None:
    if rule == "cagrad":
        pytest.importorskip("cvxpy", reason='pip install "safeloop[multitask,cagrad]"')

    class Twins(sl.Trainer):
        def losses(self, batch: Tensor) -> dict[str, Tensor]:
            hidden = self.model.features(batch)[0]
            return {"one": hidden.square().sum(), "two": hidden.square().sum()}

    model, oracle = Heads(), Heads()
    train(model, {"type": rule, "at": at}, Twins, losses={})
    total = 2 * oracle.features(data()[0])[0].square().sum()
    parameters = list(oracle.parameters())
    expected = factor * flat(torch.autograd.grad(total, parameters, allow_unused=True), parameters)
    torch.testing.assert_close(moved(oracle, model), expected, rtol=1e-6, atol=1e-9)


class Many(sl.Trainer):
    def losses(self, batch: Tensor) -> dict[str, Tensor]:
        hidden = self.model.features(batch)[0]
        return {f"t{k}": (hidden[:, k] - (-1) ** k).square().mean() + hidden[:, k - 1].sum() for k in range(5)}


@pytest.mark.parametrize("at", ["parameters", "cut"])
@pytest.mark.parametrize("rule", RULES)
def test_a_run_repeats_bitwise_and_leaves_the_global_random_state_alone(rule: str, at: str) -> None:
    if rule == "cagrad":
        pytest.importorskip("cvxpy", reason='pip install "safeloop[multitask,cagrad]"')
    seen: list[Any] = []

    class Watching(Many):
        def losses(self, batch: Tensor) -> dict[str, Tensor]:
            seen.append((torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()))
            return super().losses(batch)

    class Drawing(Many):
        def losses(self, batch: Tensor) -> dict[str, Tensor]:
            torch.randn(7)
            return super().losses(batch)

    def run(seed: int, trainer: type[sl.Trainer] = Watching) -> Tensor:
        model = Heads()
        train(model, {"type": rule, "at": at}, trainer, data=data(4), losses={}, run={"seed": seed})
        return moved(Heads(), model)

    first = run(3)
    assert all(state == seen[0] for state in seen)
    assert torch.equal(first, run(3))
    assert torch.equal(first, run(3, Drawing))
    assert torch.equal(first, run(4)) == (rule != "pcgrad")


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), factors=st.tuples(st.floats(-2, 2), st.floats(-2, 2)))
@pytest.mark.parametrize("kind", [Heads, Pair, Nested, Halves])
def test_whatever_the_factors_the_trunk_gets_their_sum(
    kind: type[Heads], seed: int, factors: tuple[float, ...]
) -> None:
    model, batch = kind(seed % 7), data(seed=seed)[0]
    expected = naive_at_cut(model, batch, lambda jacobian: torch.tensor(factors, dtype=torch.float64) @ jacobian)
    terms = model.read(model.features(batch))
    seeds = [torch.tensor(weight, dtype=torch.float64) for weight in (1.0, 0.7)]
    backward_at_cut(list(terms.values()), seeds, lambda gram: list(factors))
    found = flat([p.grad for p in model.parameters()], list(model.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("num_nodes", [1, 2])
@pytest.mark.parametrize("at", ["parameters", "cut"])
def test_a_term_that_another_was_made_from_is_combined_too(at: str, num_nodes: int) -> None:
    model, oracle, batch = Heads(), Heads(), data()[0]

    def terms(net: Heads) -> list[Tensor]:
        features = net.features(batch)
        first = net.read(features)["a"]
        return [first, (first - 2).square() + (features[0].exp().sum() if num_nodes == 2 else 0)]

    assert len(shared_cut(terms(model)).edges) == num_nodes
    factors, ones = [0.25, -3.0], [torch.ones((), dtype=torch.float64)] * 2
    parameters = list(model.parameters())
    if at == "cut":
        backward_at_cut(terms(model), ones, lambda gram: factors)
    else:
        backward_at_parameters(terms(model), ones, parameters, lambda gram: factors)
    total = sum(factor * term for factor, term in zip(factors, terms(oracle), strict=True))
    expected = torch.autograd.grad(total, list(oracle.parameters()), allow_unused=True)
    found = flat([p.grad for p in parameters], parameters)
    torch.testing.assert_close(found, flat(expected, parameters), rtol=1e-12, atol=1e-13)


def test_a_path_that_the_walk_could_not_see_is_refused() -> None:
    x = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    deep = x * 2
    reader = deep.sin()
    made: dict[str, Tensor] = {}

    def old() -> None:
        """Two nodes whose numbers say that they are older than what they were made from."""
        made["middle"] = reader.tanh().exp()

    for _ in range(50):
        deep.sin()
    thread = threading.Thread(target=old)
    thread.start()
    thread.join()
    middle = made["middle"]
    terms = [middle.sin().sum(), middle.cos().sum(), reader.sum() + deep.sum(), deep.exp().sum()]
    with pytest.raises(HiddenPath):
        backward_at_cut(terms, [torch.ones((), dtype=torch.float64)] * 4, lambda gram: [1.0] * len(gram))


def test_a_graph_whose_numbers_are_out_of_order_is_combined_all_the_same() -> None:
    """A view read after a write to its base has a newer node than what was made from it."""
    w = torch.ones(3, requires_grad=True)
    base = w * 2
    view = base[:2]
    a = (view * 3).sum()
    base.mul_(5)
    b = (view * 7).sum() + base.sum()
    ones = [torch.ones(()), torch.ones(())]
    backward_at_cut([a, b], ones, lambda gram: [1.0, 10.0])
    assert w.grad is not None
    assert w.grad.tolist() == [6.0 + 800.0, 6.0 + 800.0, 100.0]


@pytest.mark.parametrize("at", ["parameters", "cut"])
def test_bf16_trains_and_repeats_bitwise(at: str) -> None:
    def run() -> Tensor:
        model = Heads().float()
        sections: dict[str, Any] = {"data": [batch.float() for batch in data(3)], "run": {"precision": "bf16"}}
        train(model, {"type": "upgrad", "at": at}, optimizers={**SGD, "lr": 0.1}, **sections)
        return moved(Heads().float(), model)

    assert torch.equal(run(), run())
    assert run().isfinite().all()


@pytest.mark.parametrize("at", ["parameters", "cut"])
def test_what_no_term_reaches_keeps_no_gradient(at: str) -> None:
    model = Heads()
    train(model, {"type": "upgrad", "at": at})
    assert model.unused.weight.grad is None
    assert model.a.weight.grad is not None


@pytest.mark.parametrize("at", ["parameters", "cut"])
def test_a_single_term_has_its_plain_backward(at: str) -> None:
    class Single(sl.Trainer):
        def losses(self, batch: Tensor) -> dict[str, Tensor]:
            return {"a": self.model.read(self.model.features(batch))["a"]}

    combined, plain = Heads(), Heads()
    train(combined, {"type": "mgda", "at": at}, Single, losses={})
    train(plain, None, Single, losses={})
    assert torch.equal(moved(Heads(), combined), moved(Heads(), plain))


@pytest.mark.parametrize("at", ["parameters", "cut"])
def test_each_phase_combines_its_own_terms_over_what_it_trains(at: str) -> None:
    class Phased(sl.Trainer):
        @sl.phase(trains="left")
        def first(self, batch: Tensor) -> dict[str, Tensor]:
            return self.model.read(self.model.features(batch))

        @sl.phase(trains="right")
        def second(self, batch: Tensor) -> dict[str, Tensor]:
            return {"only": self.model.read(self.model.features(batch))["b"]}

    optimizers = {"left": {**SGD, "params": ["trunk.*"]}, "right": {**SGD, "params": "rest"}}
    model, oracle = Heads(), Heads()
    train(model, {"type": "pcgrad", "at": at}, Phased, data=data(2), run={"max_steps": 1}, optimizers=optimizers)
    for name, parameter in oracle.named_parameters():
        parameter.requires_grad_(name.startswith("trunk."))
    trunk = list(oracle.trunk.parameters())
    if at == "parameters":
        rows = []
        for k in range(2):
            term = weighted(oracle, oracle.features(data()[0]))[k]
            rows.append(flat(torch.autograd.grad(term, trunk), trunk))
        expected = two_pcgrad(torch.stack(rows))
    else:
        features = oracle.features(data()[0])
        rows = [torch.autograd.grad(t, features, retain_graph=True)[0] for t in weighted(oracle, features)]
        seed = two_pcgrad(torch.stack([row.flatten() for row in rows])).view_as(features[0])
        expected = flat(torch.autograd.grad(features, trunk, [seed]), trunk)
    torch.testing.assert_close(moved(oracle.trunk, model.trunk), expected, rtol=1e-9, atol=1e-10)
    assert torch.equal(oracle.a.weight, model.a.weight)


@pytest.mark.parametrize("at", ["parameters", "cut"])
def test_a_gradient_that_is_not_finite_is_still_refused(at: str) -> None:
    class Poisoned(sl.Trainer):
        def losses(self, batch: Tensor) -> dict[str, Tensor]:
            terms = self.model.read(self.model.features(batch))
            return {"a": terms["a"], "b": (terms["b"] - terms["b"]).sqrt() + 0 * terms["b"]}

    model = Heads()
    with pytest.raises(sl.FaultError, match="SL501"):
        train(model, {"type": "upgrad", "at": at}, Poisoned)
    assert not moved(Heads(), model).any()


@pytest.mark.parametrize(("at", "kind"), [("parameters", Heads), ("cut", Pair)])
def test_a_checkpoint_that_hides_parameters_is_refused(at: str, kind: type[Heads]) -> None:
    class Hidden(sl.Trainer):
        def losses(self, batch: Tensor) -> dict[str, Tensor]:
            features = self.model.features(batch)
            inner = checkpoint(self.model.a, features[0], use_reentrant=True)
            return {**self.model.read(features), "hidden": inner.sum()}

    with pytest.raises(sl.FaultError, match="SL622"):
        train(kind(), {"type": "pcgrad", "at": at}, Hidden)


def test_a_solver_that_fails_is_a_fault_before_any_update() -> None:
    model = Heads()
    with (
        patch("torchjd.aggregation.UPGradWeighting.forward", side_effect=ValueError("no solution")),
        pytest.raises(sl.FaultError, match="SL621") as caught,
    ):
        train(model, {"type": "upgrad"})
    assert "no solution" in caught.value.fault.what
    assert not moved(Heads(), model).any()


def test_sparse_gradients_are_combined() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Embedding(6, 3, sparse=True)

    class Rows(sl.Trainer):
        def losses(self, batch: Tensor) -> dict[str, Tensor]:
            rows, weight = self.model.table(batch), self.model.table.weight
            return {"a": rows.square().sum(), "b": (rows - 1).square().sum(), "all": weight.square().sum()}

    model = Table()
    train(model, {"type": "mgda"}, Rows, data=[torch.tensor([1, 1, 4])], losses={}, optimizers={**SGD, "fused": False})
    assert model.table.weight.isfinite().all()


@pytest.mark.parametrize(
    ("combine", "sections", "code", "path"),
    [
        ({"type": "pcgrad"}, {"accumulate": {"micro_batches": 2}}, "SL131", "accumulate.micro_batches"),
        ({"type": "pcgrad"}, {"run": {"precision": "fp16"}}, "SL131", "run.precision"),
        ({"type": "mgda", "at": "cut"}, {"optimizers": {"type": "LBFGS"}}, "SL131", "optimizers"),
        ({"type": "mgda"}, {"simultaneous": True}, "SL131", "simultaneous"),
        ({"type": "nash"}, {}, "SL105", "combine.type"),
        ({"type": "upgrad", "at": "loss"}, {}, "SL104", "combine.at"),
        ({"type": "upgrad", "c": 0.5}, {}, "SL101", "combine.c"),
        ({"type": "cagrad", "c": 1.0}, {}, "SL104", "combine.c"),
        ({"at": "cut"}, {}, "SL102", "combine.type"),
    ],
)
def test_what_cannot_be_meant_is_refused(combine: Any, sections: dict[str, Any], code: str, path: str) -> None:
    with pytest.raises(sl.FaultError) as caught:
        train(Heads(), combine, **sections)
    faults = [caught.value.fault, *caught.value.others]
    assert [(fault.code, path in fault.where) for fault in faults if fault.code == code] == [(code, True)]


def test_a_ready_lbfgs_is_refused_when_the_plan_is_built() -> None:
    model = Heads()
    with pytest.raises(sl.FaultError, match="SL610"):
        train(model, {"type": "mgda"}, optimizers=torch.optim.LBFGS(model.parameters()))


@pytest.mark.parametrize(
    ("rule", "missing", "line"),
    [
        ("pcgrad", "torchjd", 'pip install "safeloop[multitask]"'),
        ("upgrad", "quadprog", 'pip install "safeloop[multitask]"'),
        ("cagrad", "cvxpy", 'pip install "safeloop[multitask,cagrad]"'),
    ],
)
def test_a_missing_package_is_a_fault_of_the_config_with_the_line_that_installs_it(
    rule: str, missing: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(sl.FaultError) as caught:
        train(Heads(), {"type": rule})
    assert caught.value.fault.code == "SL130"
    assert missing in caught.value.fault.what
    assert caught.value.fault.fix == line


def test_the_plan_says_how_the_gradients_are_combined() -> None:
    def plan(combine: Any) -> str:
        run = {"max_steps": 1}
        return Run(model=Heads(), data=data(), optimizers=SGD, combine=combine, run=run, log=OFF).plan().why()

    assert "a pass for each term, upgrad of their gradients" in plan({"type": "upgrad"})
    assert "pcgrad of the terms' gradients at the features that they share" in plan({"type": "pcgrad", "at": "cut"})
    assert "combine" not in plan(None)


@pytest.mark.parametrize("at", ["parameters", "cut"])
def test_the_log_has_the_norms_that_the_rule_was_given(tmp_path: Path, at: str) -> None:
    log, run = {"every": 1, "sinks": ["jsonl"]}, {"dir": str(tmp_path)}
    result = train(Heads(), {"type": "pcgrad", "at": at}, log=log, run=run)
    assert result.dir is not None
    line = json.loads((result.dir / "metrics.jsonl").read_text().splitlines()[0])
    model = Heads()
    features = model.features(data()[0])
    inputs = features if at == "cut" else [*model.trunk.parameters(), *model.a.parameters()]
    gradients = torch.autograd.grad(weighted(model, features)[0], inputs)
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
    assert line["loss_grad/a" if at == "cut" else "loss_grad_exact/a"] == pytest.approx(norm, rel=1e-6)
    assert ("loss_cos/a~b" in line) == (at == "cut")
