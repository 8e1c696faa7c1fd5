"""Random runs against the naive float64 step of `naive.py`: no difference beyond 1e-12.

A fixed slice of examples runs always; `SAFELOOP_SOAK=1` draws 500 fresh ones.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

import safeloop as sl

_PLACE = importlib.util.spec_from_file_location("safeloop_naive_oracle", Path(__file__).with_name("naive.py"))
assert _PLACE is not None
assert _PLACE.loader is not None
naive = importlib.util.module_from_spec(_PLACE)
sys.modules[_PLACE.name] = naive
_PLACE.loader.exec_module(naive)

IS_SOAK = os.environ.get("SAFELOOP_SOAK") == "1"
EXACT = 1e-12
"""The bound in float64. One fused pass adds the terms' gradients in another order than a sum over passes: 1e-16 of the
largest summand. Optimizers that divide by the size of a gradient blow that up by `lr / eps` a step: 5 with `EPS`."""
EPS = 1e-2
LOGGED = 2e-6
"""Relative; what is logged passes through float32."""


def slice_of(examples: int, soak: int) -> Callable[[Any], Any]:
    """A fixed set of examples, or many fresh ones."""
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(
        max_examples=soak if IS_SOAK else examples,
        derandomize=not IS_SOAK,
        database=None,
        deadline=None,
        suppress_health_check=quiet,
    )


class Net(nn.Module):
    """A trunk, up to three heads on it (the first two may share a weight), and a critic on what the heads say."""

    def __init__(self, heads: int, *, is_tied: bool, has_norm: bool, has_dropout: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(4, 5, bias=not has_norm)]
        layers += [nn.BatchNorm1d(5)] if has_norm else []
        layers += [nn.Tanh(), *([nn.Dropout(0.3)] if has_dropout else [])]
        self.trunk = nn.Sequential(*layers)
        for i in range(heads):
            self.add_module(f"head{i}", nn.Linear(5, 3))
        if is_tied:
            self.head1.weight = self.head0.weight
        self.critic = nn.Linear(3, 1)

    def head(self, i: int) -> nn.Module:
        return self.get_submodule(f"head{i}")


class TermCase(NamedTuple):
    """A loss term: what it computes, on which head, by which weight (None: not declared), and when."""

    name: str
    kind: str
    head: int
    weight: float | tuple[float, float, int] | None = None
    """a number, or from, to and the number of steps between"""
    every: int = 1

    def weight_at(self, step: int) -> float:
        if not isinstance(self.weight, tuple):
            return 1.0 if self.weight is None else self.weight
        start, end, steps = self.weight
        return start + (end - start) * step / steps if step < steps else end

    @property
    def reaches(self) -> set[str]:
        """Modules whose parameters it may train."""
        head = f"head{self.head}"
        return {
            "trunk": {"trunk"},
            "decay": {head},
            "detached": {head},
            "critic": {"trunk", head, "critic"},
            "penalty": {"trunk", head, "critic"},
        }.get(self.kind, {"trunk", head})

    @property
    def section(self) -> dict[str, Any]:
        """What the config says of it."""
        section: dict[str, Any] = {"every": self.every} if self.every > 1 else {}
        section |= {"may_be_constant": True} if self.kind in ("sometimes", "absent") else {}
        if isinstance(self.weight, tuple):
            return section | {"weight": dict(zip(("start", "end", "steps"), self.weight, strict=True))}
        return section if self.weight is None else section | {"weight": self.weight}


class PhaseCase(NamedTuple):
    """One phase; its name is None where the Trainer has no phases."""

    name: str | None
    terms: tuple[TermCase, ...]
    trains: tuple[str, ...]
    repeat: int
    every: int
    shares_forward: bool
    is_set_by_config: bool


class OwnerCase(NamedTuple):
    """One optimizer as the config says it, and the modules that it owns."""

    name: str
    modules: tuple[str, ...]
    kind: str
    arguments: dict[str, Any]
    bias_arguments: dict[str, Any]
    clipping: dict[str, Any]
    schedule: dict[str, Any] | None
    implementation: dict[str, bool]

    @property
    def spec(self) -> dict[str, Any]:
        optional = {**self.clipping, "scheduler": self.schedule}
        groups = [{"params": ["*.bias"], **self.bias_arguments}] if self.bias_arguments else []
        patterns = [f"{module}.*" for module in self.modules]
        common = {"type": self.kind, "params": patterns, "groups": groups, **self.arguments, **self.implementation}
        return common | {name: value for name, value in optional.items() if value is not None}


class Case(NamedTuple):
    """A whole run."""

    heads: int
    is_tied: bool
    has_norm: bool
    has_dropout: bool
    owners: tuple[OwnerCase, ...]
    frozen: tuple[str, ...]
    is_frozen_by_config: bool
    has_ready_optimizers: bool
    phases: tuple[PhaseCase, ...]
    sizes: tuple[int, ...]
    poison: int | None
    run: dict[str, Any]
    micro_batches: int
    weight_by: str
    audit: str
    log_every: int
    is_logged: bool
    evaluate_every: int | None

    @property
    def terms(self) -> list[TermCase]:
        return [term for phase in self.phases for term in phase.terms]

    def make_net(self, dtype: torch.dtype) -> Net:
        torch.manual_seed(len(self.sizes))
        net = Net(self.heads, is_tied=self.is_tied, has_norm=self.has_norm, has_dropout=self.has_dropout)
        return net.to(dtype)

    def batches(self, dtype: torch.dtype, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        made = [[torch.randn(n, k, generator=generator, dtype=dtype) for k in (4, 3)] for n in self.sizes]
        if self.poison is not None and seed == 0:
            made[self.poison][0][0, 0] = torch.nan
        return [(x, y) for x, y in made]


def number_of_tokens(batch: tuple[Tensor, Tensor]) -> int:
    return int((batch[0][:, 0] > 0).sum())


MEASURES: dict[str, Callable[[Any], float]] = {
    "samples": lambda batch: len(batch[0]),
    "tokens": number_of_tokens,
    "batches": lambda batch: 1,
}


def losses_of(net: Any, batch: tuple[Tensor, Tensor], phase: PhaseCase) -> dict[str, Any]:
    """The terms of a phase: what a user would write."""
    x, y = batch
    hidden = net.trunk(x) if phase.shares_forward else None
    values = {
        term.name: term_value(net, x, y, net.trunk(x) if hidden is None else hidden, term) for term in phase.terms
    }
    return {name: value for name, value in values.items() if value is not None}


def term_value(net: Any, x: Tensor, y: Tensor, hidden: Tensor, term: TermCase) -> Any:
    head = net.head(term.head)
    if term.kind == "trunk":
        return (hidden - 0.1).square().mean()
    if term.kind == "decay":
        return head.weight.square().sum()
    if term.kind == "detached":
        return F.mse_loss(head(hidden.detach()), y)
    if term.kind == "critic":
        return F.softplus(net.critic(head(hidden))).mean()
    if term.kind == "penalty":
        leaf = x.detach().requires_grad_()
        scores = net.critic(torch.tanh(head(net.trunk(leaf)))).sum()
        (slope,) = torch.autograd.grad(scores, leaf, create_graph=True)
        return (slope.square().sum(1) + 1).log().mean()
    if term.kind == "weighted":
        return head(hidden), y.abs() / y.numel()
    if term.kind == "deferred":
        return lambda: F.mse_loss(head(net.trunk(x)), y)
    if term.kind == "sometimes" and len(x) % 2:
        return torch.zeros((), dtype=x.dtype)
    if term.kind == "absent" and len(x) % 2:
        return None
    return F.mse_loss(head(hidden), y)


# ------------------------------------------------------------------------------------------------- what is drawn


@st.composite
def terms(draw: st.DrawFn, heads: int, trained: set[str], phase: str) -> tuple[TermCase, ...]:
    kinds = [
        "fit",
        "fit",
        "trunk",
        "decay",
        "detached",
        "critic",
        "penalty",
        "weighted",
        "sometimes",
        "absent",
        "deferred",
    ]
    possible = [TermCase("", kind, head) for kind in kinds for head in range(heads)]
    chosen = draw(st.lists(st.sampled_from([t for t in possible if t.reaches & trained]), min_size=1, max_size=4))
    weights = st.none() | st.sampled_from([0.0, 1.0, 2.5, -0.3, (0.0, 1.0, 3), (2.0, 0.5, 2)]) | st.floats(0.1, 2.0)
    if chosen[0].kind == "absent":  # a loss function that returns nothing is refused
        chosen[0] = chosen[0]._replace(kind="fit")
    named = [t._replace(name=f"{phase}.{t.kind}{i}", weight=draw(weights)) for i, t in enumerate(chosen)]
    return tuple(t._replace(every=draw(st.sampled_from([1, 1, 2, 3])) if i else 1) for i, t in enumerate(named))


@st.composite
def owner_cases(draw: st.DrawFn, name: str, modules: tuple[str, ...], *, is_gentle: bool) -> OwnerCase:
    kind = draw(st.sampled_from(["SGD", "Adam", "AdamW", "Adagrad", "RMSprop"]))
    lr = draw(st.sampled_from([0.003, 0.01, 0.05]))
    arguments: dict[str, Any] = {"lr": lr}
    if draw(st.booleans()):
        arguments["weight_decay"] = draw(st.sampled_from([0.0, 0.01, 0.2]))
    if kind == "SGD":
        arguments["momentum"] = draw(st.sampled_from([0.0, 0.5, 0.9]))
        if arguments["momentum"]:
            arguments |= draw(st.sampled_from([{}, {"nesterov": True}, {"dampening": 0.3}]))
    elif not is_gentle:
        arguments["eps"] = EPS
    else:
        arguments["eps"] = 1.0
    if kind in ("Adam", "AdamW"):
        arguments |= {"betas": draw(st.sampled_from([(0.9, 0.999), (0.0, 0.9)])), "amsgrad": draw(st.booleans())}
    if kind == "Adagrad":
        arguments |= {"lr_decay": draw(st.sampled_from([0.0, 0.1]))}
    if kind == "RMSprop":
        arguments |= {"alpha": 0.9, "momentum": draw(st.sampled_from([0.0, 0.5]))}
    if draw(st.integers(0, 3)) == 3:
        arguments |= {"maximize": True, "lr": 0.003}  # slow: what only grows must stay near 1
    return OwnerCase(
        name,
        modules,
        kind,
        arguments,
        draw(st.sampled_from([{}, {"weight_decay": 0.0}, {"lr": lr / 2}, {"lr": lr / 3, "weight_decay": 0.05}])),
        draw(clippings()),
        draw(schedules()),
        draw(implementations(kind, writes_gradients="nesterov" in arguments)),
    )


def implementations(kind: str, *, writes_gradients: bool) -> st.SearchStrategy[dict[str, bool]]:
    """How the optimizer runs; torch's nesterov leaves other gradients behind with `foreach`."""
    plain = {"foreach": False} if kind == "RMSprop" else {"fused": False}
    return st.sampled_from([{}, {}, plain, *([] if writes_gradients else [{"foreach": True}])])


def clippings() -> st.SearchStrategy[dict[str, Any]]:
    by_norm = [{"max_norm": 0.05}, {"max_norm": 0.3}, {"max_norm": 2.0}]
    return st.sampled_from([{}, {}, *by_norm, {"clip_value": 0.02}, {"agc": {"clip": 0.05, "eps": 0.5}}])


def careful(owner: OwnerCase, phases: Sequence[PhaseCase]) -> OwnerCase:
    """Without the fused kernel where torch's fused SGD raises: with dampening, and a first gradient that is late."""
    first = next(phase for phase in phases if owner.name in phase.trains)
    kinds = ("fit", "weighted", "critic", "trunk", "detached")
    reached = set().union(*(term.reaches for term in first.terms if term.kind in kinds))
    is_safe = "dampening" not in owner.arguments or set(owner.modules) <= reached
    return owner if is_safe else owner._replace(implementation={"fused": False})


def schedules() -> st.SearchStrategy[dict[str, Any] | None]:
    return st.sampled_from(
        [
            None,
            None,
            {"type": "StepLR", "step_size": 2, "gamma": 0.5},
            {"type": "ExponentialLR", "gamma": 0.7},
            {"type": "CosineAnnealingLR", "T_max": 5},
            {"type": "LinearLR", "start_factor": 0.25, "total_iters": 4},
        ]
    )


@st.composite
def parts(draw: st.DrawFn, modules: Sequence[str], *, is_tied: bool) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """Modules by owner, and those that are frozen; tied heads stay together."""
    count = draw(st.integers(1, 3))
    places = [draw(st.integers(0, count - 1)) for _ in modules]
    is_still = [draw(st.integers(0, 5)) == 5 for _ in modules]
    if is_tied:
        places[2], is_still[2] = places[1], is_still[1]
    owned = [
        tuple(m for m, at, still in zip(modules, places, is_still, strict=True) if at == i and not still)
        for i in range(count)
    ]
    owned = [group for group in owned if group] or [tuple(modules)]
    held = {module for group in owned for module in group}
    return owned, tuple(module for module in modules if module not in held)


def reaching_all(
    found: tuple[TermCase, ...], modules: Mapping[str, set[str]], trained: Sequence[str]
) -> tuple[TermCase, ...]:
    """The terms, and one more for each owner that none of them surely reaches: a phase without it is refused."""
    prefix = found[0].name.partition(".")[0]
    for owner in trained:
        surely = [term.reaches for term in found if term.kind not in ("sometimes", "absent")]
        if not modules[owner] & set().union(*surely):
            module = min(modules[owner])
            kind = {"trunk": "trunk", "critic": "critic"}.get(module, "detached")
            head = int(module.removeprefix("head")) if kind == "detached" else 0
            found = (*found, TermCase(f"{prefix}.{kind}{len(found)}", kind, head))
    return found


@st.composite
def phase_cases(draw: st.DrawFn, heads: int, owners: Sequence[OwnerCase]) -> tuple[PhaseCase, ...]:
    names = tuple(owner.name for owner in owners)
    count = draw(st.integers(0, 3))
    trained: list[tuple[str, ...]] = [names]
    if count:
        trained = [tuple(draw(st.lists(st.sampled_from(names), min_size=1, unique=True))) for _ in range(count)]
        missing = tuple(name for name in names if not any(name in group for group in trained))
        trained[-1] = (*trained[-1], *missing)
    modules = {owner.name: set(owner.modules) for owner in owners}

    def reachable(group: Sequence[str]) -> set[str]:
        return set().union(*(modules[name] for name in group))

    return tuple(
        PhaseCase(
            f"phase{i}" if count else None,
            reaching_all(draw(terms(heads, reachable(group), f"p{i}")), modules, group if count else ()),
            group,
            draw(st.integers(1, 3)) if count else 1,
            draw(st.integers(1, 3)) if count else 1,
            draw(st.booleans()),
            draw(st.booleans()),
        )
        for i, group in enumerate(trained)
    )


@st.composite
def cases(draw: st.DrawFn, *, is_gentle: bool = False, is_poisoned: bool = False) -> Case:
    """Runs; the gentle ones without what makes a rounding error grow, the poisoned ones with a NaN in a batch."""
    heads = draw(st.integers(1, 3))
    is_tied = heads > 1 and draw(st.booleans())
    has_norm = draw(st.booleans()) and not is_gentle and not is_poisoned  # a NaN would stay in its buffers
    modules = ["trunk", *(f"head{i}" for i in range(heads)), "critic"]
    owned, frozen = draw(parts(modules, is_tied=is_tied))
    owners = tuple(draw(owner_cases(f"o{i}", group, is_gentle=is_gentle)) for i, group in enumerate(owned))
    is_ready = draw(st.integers(0, 3)) == 3
    if is_ready:
        owners = tuple(owner._replace(clipping={}, schedule=None) for owner in owners)
    phases = draw(phase_cases(heads, owners))
    sizes = draw(st.lists(st.integers(3 if has_norm else 1, 6), min_size=1, max_size=7))
    return Case(
        heads=heads,
        is_tied=is_tied,
        has_norm=has_norm,
        has_dropout=draw(st.booleans()) and not is_gentle,
        owners=tuple(careful(owner, phases) for owner in owners),
        frozen=frozen,
        is_frozen_by_config=draw(st.booleans()),
        has_ready_optimizers=is_ready,
        phases=phases,
        sizes=tuple(sizes),
        poison=draw(st.integers(0, len(sizes) - 1)) if is_poisoned else None,
        run=draw(st.sampled_from([{"max_steps": 3}, {"max_steps": 7}, {"max_epochs": 1}, {"max_epochs": 3}])),
        micro_batches=draw(st.sampled_from([1, 2, 3, 5])),
        weight_by=draw(st.sampled_from(list(MEASURES))),
        audit=draw(st.sampled_from(["off", "standard", "full"])),
        log_every=draw(st.integers(1, 4)),
        is_logged=draw(st.integers(0, 2)) == 2,
        evaluate_every=draw(st.none() | st.integers(1, 3)),
    )


# ------------------------------------------------------------------------------------------------- the two runs


def trainer_class(case: Case) -> type[sl.Trainer]:
    """What a user would write, as a class."""

    def method(phase: PhaseCase) -> Any:
        return lambda self, batch: losses_of(self.model, batch, phase)

    def metrics(self: Any, batch: Any) -> dict[str, Any]:
        torch.rand(3)
        return {"size": self.model.trunk(batch[0]).abs().mean(1)}

    body: dict[str, Any] = {}
    for phase in case.phases:
        if phase.name is None:
            body["losses"] = method(phase)
        else:
            marks = {} if phase.is_set_by_config else {"repeat": phase.repeat, "every": phase.every}
            body[phase.name] = sl.phase(trains=phase.trains, **marks)(method(phase))
    if case.weight_by == "tokens":
        body["count_tokens"] = lambda self, batch: number_of_tokens(batch)
    if case.evaluate_every is not None:
        body["metrics"] = metrics
    return type("Run", (sl.Trainer,), body)


def freeze(case: Case, net: Net) -> None:
    for module in case.frozen:
        net.get_submodule(module).requires_grad_(False)


def plain_optimizer(owner: OwnerCase, net: Net, **implementation: bool) -> Optimizer:
    """The optimizer without patterns: its parameters are collected by module, biases last."""
    everything = {p: n for module in owner.modules for n, p in net.get_submodule(module).named_parameters()}
    biases = [p for p, name in everything.items() if owner.bias_arguments and name.split(".")[-1] == "bias"]
    rest = [p for p in everything if not any(p is bias for bias in biases)]
    groups = [{"params": rest}] if rest else []
    groups += [{"params": biases, **owner.bias_arguments}] if biases else []
    make: Any = getattr(torch.optim, owner.kind)
    made: Optimizer = make(groups, **owner.arguments, **implementation)
    return made


def plain_owner(owner: OwnerCase, net: Net) -> Any:
    optimizer = plain_optimizer(owner, net, foreach=False)
    given = dict(owner.schedule or {})
    kind = given.pop("type", None)
    schedule = getattr(lr_scheduler, kind)(optimizer, **given) if kind else None
    limits = {name: tuple(v.values()) if isinstance(v, dict) else v for name, v in owner.clipping.items()}
    return naive.Owner(optimizer, **limits, scheduler=schedule)


def plain_job(case: Case, net: Net, dtype: torch.dtype, **options: Any) -> Any:
    def losses(phase: PhaseCase) -> Any:
        return lambda batch: losses_of(net, batch, phase)

    return naive.Job(
        owners={owner.name: plain_owner(owner, net) for owner in case.owners},
        phases=[naive.Phase(losses(p), p.trains, p.repeat, p.every) for p in case.phases],
        weights={term.name: term.weight_at for term in case.terms},
        term_every={term.name: term.every for term in case.terms},
        data=case.batches(dtype),
        max_steps=case.run.get("max_steps"),
        max_epochs=case.run.get("max_epochs"),
        micro_batches=case.micro_batches,
        measure=MEASURES[case.weight_by],
        skips_nonfinite=case.poison is not None,
        **options,
    )


def sections_of(case: Case, net: Net, dtype: torch.dtype) -> dict[str, Any]:
    """The keywords of the Trainer."""
    by_config = [phase for phase in case.phases if phase.name and phase.is_set_by_config]
    sections: dict[str, Any] = {
        "optimizers": {owner.name: owner.spec for owner in case.owners},
        "losses": {term.name: term.section for term in case.terms if term.section},
        "phases": {p.name: {"repeat": p.repeat, "every": p.every} for p in by_config},
        "accumulate": {"micro_batches": case.micro_batches, "weight_by": case.weight_by},
        "audit": {"level": case.audit, "accept": {"SL413": ["*"], "SL502": ["*"]}},
        "log": {"every": case.log_every, "sinks": ["jsonl"] if case.is_logged else []},
        "nonfinite": {"policy": "skip", "max_consecutive": 1000} if case.poison is not None else {},
        "evaluate": {"every": case.evaluate_every},
    }
    if case.has_ready_optimizers:
        sections["optimizers"] = {o.name: plain_optimizer(o, net, **o.implementation) for o in case.owners}
    if case.is_frozen_by_config:
        sections["frozen"] = [f"{module}.*" for module in case.frozen]
    else:
        freeze(case, net)
    if case.evaluate_every is not None:
        sections["eval_data"] = case.batches(dtype, seed=1)
    return sections


@contextmanager
def trained(case: Case, net: Net, dtype: torch.dtype, **run: Any) -> Iterator[tuple[sl.Trainer, sl.RunResult]]:
    """The Trainer after its run, while its folder still exists."""
    with tempfile.TemporaryDirectory() as folder:
        section = {"seed": 5, "dir": folder, **case.run, **run}
        made = trainer_class(case)(model=net, data=case.batches(dtype), run=section, **sections_of(case, net, dtype))
        yield made, made.fit()


def optimizers_of(trainer: sl.Trainer) -> Mapping[str, Optimizer]:
    return {name: owner.optimizer for name, owner in trainer._assembled().owners.items()}


# ------------------------------------------------------------------------------------------------- the comparison


def assert_close(what: str, ours: Tensor | None, plain: Tensor | None, bound: float) -> None:
    if ours is None or plain is None:
        assert ours is plain, f"{what}: {'no' if ours is None else 'a'} value in place of the other"
        return
    assert torch.allclose(ours, plain, rtol=0.0, atol=bound, equal_nan=True), f"{what}: {(ours - plain).abs().max()}"


def assert_same_nets(ours: Net, plain: Net, when: str) -> None:
    expected = plain.state_dict()
    for name, tensor in ours.state_dict().items():
        assert_close(f"{name} {when}", tensor, expected[name], EXACT)


def assert_same_records(folder: Path | None, case: Case, steps: Sequence[Any]) -> None:
    """Every logged loss, gradient norm and learning rate."""
    assert folder is not None
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seen = [record for record in records if record["kind"] == "train"]
    due = [i for i in range(1, len(steps) + 1) if i % case.log_every == 0 or i == case.run.get("max_steps")]
    assert [record["step"] for record in seen] == due
    for record in seen:
        number = record["step"] - 1
        step, weights = steps[number], {term.name: term.weight_at(number) for term in case.terms}
        expected = {f"loss/{name}": value for name, value in step.losses.items()}
        expected["loss/train"] = sum(weights[name] * value for name, value in step.losses.items())
        expected |= {f"grad/{name}/pre_clip": norm for name, norm in step.norms.items()}
        expected["safety/skipped_total"] = sum(s.num_skipped for s in steps[: number + 1])
        for name, rates in step.rates.items():
            few = set(rates)
            expected |= {f"optim/lr/{name}": rates[0]} if len(few) == 1 else {}
        for tag, value in expected.items():
            near = pytest.approx(value, rel=LOGGED, abs=LOGGED, nan_ok=True)
            assert float(record[tag]) == near, f"{tag} of step {record['step']}"


def continue_both(ours: Net, plain: Net, mine: Mapping[str, Optimizer], theirs: Mapping[str, Any]) -> None:
    """Two more updates by hand: what the optimizers keep must be the same too."""
    generator = torch.Generator().manual_seed(9)
    for optimizer in mine.values():
        for group in optimizer.param_groups:
            group["fused"] = False  # torch's fused SGD cannot begin with a parameter that has had no gradient so far
    for _ in range(2):
        for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator, dtype=a.dtype)
            b.grad = a.grad.clone()  # torch's nesterov writes into it
        for name, optimizer in mine.items():
            optimizer.step()
            theirs[name].optimizer.step()


def assert_equals_the_naive_run(case: Case) -> None:
    ours = case.make_net(torch.float64)
    plain = copy.deepcopy(ours)
    freeze(case, plain)
    job = plain_job(case, plain, torch.float64)
    with trained(case, ours, torch.float64) as (trainer, result):
        torch.manual_seed(5)
        steps = naive.train(job)
        assert result.steps == len(steps)
        if case.is_logged:
            assert_same_records(result.dir, case, steps)
    assert_same_nets(ours, plain, "after the run")
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert a.requires_grad == b.requires_grad, name
        assert_close(f"gradient of {name}", a.grad, b.grad, EXACT)
    mine = optimizers_of(trainer)
    for name, owner in job.owners.items():
        rates = sorted(float(group["lr"]) for group in mine[name].param_groups)
        assert rates == pytest.approx(sorted(owner.rates), abs=1e-15), name
    continue_both(ours, plain, mine, job.owners)
    assert_same_nets(ours, plain, "after two more updates")


@slice_of(45, 500)
@given(case=cases())
def test_any_run_equals_the_naive_one(case: Case) -> None:
    assert_equals_the_naive_run(case)


@slice_of(15, 100)
@given(case=cases(is_poisoned=True))
def test_any_run_that_skips_a_poisoned_batch_equals_the_naive_one(case: Case) -> None:
    assert_equals_the_naive_run(case)


@slice_of(10, 100)
@given(case=cases(is_gentle=True))
def test_a_bf16_run_stays_near_the_naive_autocast_run(case: Case) -> None:
    """bf16 keeps 8 bits: gradients summed in another order differ by 2^-8 of them, hence of the way travelled."""
    ours = case.make_net(torch.float32)
    plain = copy.deepcopy(ours)
    start = copy.deepcopy(ours)
    freeze(case, plain)
    job = plain_job(case, plain, torch.float32, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    formats: set[torch.dtype] = set()
    ours.trunk.register_forward_hook(lambda module, inputs, output: formats.add(output.dtype))
    with trained(case, ours, torch.float32, precision="bf16") as (_, result):
        torch.manual_seed(5)
        assert result.steps == len(naive.train(job))
    assert torch.bfloat16 in formats or not result.steps, "a run that the data does not suffice for takes no step"
    off = torch.cat([(a - b).flatten() for a, b in zip(ours.parameters(), plain.parameters(), strict=True)]).norm()
    way = torch.cat([(a - b).flatten() for a, b in zip(start.parameters(), plain.parameters(), strict=True)]).norm()
    assert off <= 0.02 * way + 1e-6, (off, way)


class Late(sl.Trainer):
    """A loss whose second term comes on the third step only."""

    def losses(self, batch: Tensor) -> dict[str, Tensor]:
        first = {"head": self.model["head"](batch).square().mean()}
        return first if self.step < 2 else {**first, "late": self.model["late"](batch).square().mean()}


def fit_late(optimizers: dict[str, Any]) -> None:
    net = nn.ModuleDict({"head": nn.Linear(2, 1), "late": nn.Linear(2, 1)})
    Late(model=net, data=[torch.ones(4, 2)], optimizers=optimizers, run={"max_steps": 5}, log={"sinks": []}).fit()


def test_an_owner_may_have_its_first_gradient_late() -> None:
    sgd = {"type": "SGD", "lr": 0.1}
    fit_late({"a": {**sgd, "params": ["head.*"]}, "b": {**sgd, "params": "rest"}})


def test_a_parameter_may_have_its_first_gradient_later_than_others() -> None:
    fit_late({"main": {"type": "SGD", "lr": 0.1, "momentum": 0.9}})
