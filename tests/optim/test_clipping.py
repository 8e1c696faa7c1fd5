"""Clipping by norm, by value and adaptively, against torch's own functions and a loop over rows."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import safeloop as sl
from safeloop import assembly
from safeloop.audit.observer import FIRST_STEPS
from safeloop.optim.clipping import clip_adaptively, clip_by_norm, clip_by_value, largest_entry
from safeloop.step import DeferredGate

OFF: dict[str, Any] = {"sinks": []}
SHAPES = [(), (1,), (5,), (4, 3), (2, 3, 2, 2), (1, 1)]
EPS = 1e-3


def drawn(shapes: list[tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def by_rows(gradient: Tensor, weight: Tensor, limit: float, eps: float = EPS) -> Tensor:
    """Equation 3, unit by unit, in Python floats."""
    if weight.dim() >= 2:
        return torch.stack([unit(g, w, limit, eps) for g, w in zip(gradient, weight, strict=True)])
    return unit(gradient, weight, limit, eps)


def unit(gradient: Tensor, weight: Tensor, limit: float, eps: float) -> Tensor:
    norm = math.sqrt(sum(x * x for x in gradient.flatten().tolist()))
    most = limit * max(math.sqrt(sum(x * x for x in weight.flatten().tolist())), eps)
    return gradient * (most / norm) if norm > most else gradient


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    limit=st.sampled_from([1e-3, 0.01, 0.5, 10.0]),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 1e6]),
    small=st.booleans(),
)
def test_each_unit_is_clipped_as_equation_3_says(
    shapes: Any, seed: int, limit: float, scale: float, small: bool
) -> None:
    weights = [w * (1e-5 if small else 1.0) for w in drawn(shapes, seed)]
    gradients = [g * scale for g in drawn(shapes, seed + 1)]
    expected = [by_rows(g, w, limit) for g, w in zip(gradients, weights, strict=True)]
    was_clipped = any(not torch.equal(e, g) for e, g in zip(expected, gradients, strict=True))
    assert bool(clip_adaptively(gradients, weights, limit, EPS)) == was_clipped
    for ours, theirs in zip(gradients, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-14, atol=0)


def test_a_unit_below_its_limit_keeps_its_bits() -> None:
    weight, gradient = torch.ones(3, 4), torch.full((3, 4), 1e-4)
    gradient[1] = 7.0
    before = gradient.clone()
    assert clip_adaptively([gradient], [weight], 0.01, EPS)
    assert torch.equal(gradient[[0, 2]], before[[0, 2]])
    assert torch.linalg.vector_norm(gradient[1]).item() == pytest.approx(0.01 * 2.0)


def test_a_finite_gradient_whose_float32_norm_overflows_keeps_its_direction() -> None:
    gradient = torch.full((2, 2), 1e30)
    assert clip_adaptively([gradient], [torch.ones(2, 2)], 0.01, EPS, torch.float64)
    assert torch.allclose(gradient, torch.full((2, 2), 0.01))


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 2), (6,)])
def test_a_sparse_gradient_is_clipped_as_its_dense_form(shape: tuple[int, ...]) -> None:
    (weight,), (rows,) = drawn([shape], 0), drawn([(3, *shape[1:])], 1)
    sparse = torch.sparse_coo_tensor(torch.tensor([[4, 1, 4]]), rows, shape, check_invariants=True).coalesce()
    dense = sparse.to_dense()
    assert clip_adaptively([sparse], [weight], 0.1, EPS)
    assert clip_adaptively([dense], [weight], 0.1, EPS)
    assert torch.allclose(sparse.to_dense(), dense, rtol=1e-14, atol=0)
    both = torch.sparse_coo_tensor(torch.tensor([[4, 1, 4]]), rows, shape, check_invariants=True).coalesce()
    clip_by_value([both], 0.3)
    assert both.to_dense().abs().max() == 0.3


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4), seed=st.integers(0, 99), limit=st.floats(0.1, 3)
)
def test_value_and_norm_have_the_bits_of_torchs_functions(shapes: Any, seed: int, limit: float) -> None:
    gradients = drawn(shapes, seed, torch.float32) + drawn(shapes, seed, torch.float64)
    plain = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for function, torchs in ((clip_by_value, nn.utils.clip_grad_value_), (clip_by_norm, None)):
        for parameter, gradient in zip(plain, gradients, strict=True):
            parameter.grad = gradient.clone()
        ours = [g.clone() for g in gradients]
        if torchs is not None:
            assert largest_entry(ours).item() == pytest.approx(max(g.abs().max().item() for g in ours), rel=1e-6)
            torchs(plain, limit)
            function(ours, limit)
        else:
            total = nn.utils.get_total_norm(gradients)
            nn.utils.clip_grads_with_norm_(plain, limit, total)
            function(ours, total, limit)
        assert all(torch.equal(a, p.grad) for a, p in zip(ours, plain, strict=True))


class Classify(sl.Trainer):
    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.model(x), y)


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def batches(n: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 4, generator=generator), torch.randint(3, (16,), generator=generator)) for _ in range(n)]


def unitwise(x: Tensor) -> Tensor:
    """The unit norm of a plain loop, shaped to multiply."""
    return x.norm() if x.dim() < 2 else x.norm(dim=tuple(range(1, x.dim())), keepdim=True)


def plain_clip(net: nn.Sequential, kind: str) -> None:
    if kind == "clip_value":
        nn.utils.clip_grad_value_(net.parameters(), 0.01)
        return
    for name, p in net.named_parameters():
        if kind == "agc" or not name.startswith("2."):
            most = unitwise(p.detach()).clamp(min=EPS) * 0.02
            p.grad.mul_((most / unitwise(p.grad)).clamp(max=1.0))


CONFIGS: dict[str, dict[str, Any]] = {
    "clip_value": {"clip_value": 0.01},
    "agc": {"agc": {"clip": 0.02, "eps": EPS}},
    "agc, the head left alone": {"agc": {"clip": 0.02, "eps": EPS, "except": ["2.*"]}},
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_a_clipped_run_has_the_bits_of_the_plain_loop(kind: str, optimizer: str) -> None:
    net = make_net()
    plain, unclipped = copy.deepcopy(net), copy.deepcopy(net)
    for one, clip in ((plain, True), (unclipped, False)):
        theirs = getattr(torch.optim, optimizer)(one.parameters(), lr=0.05, fused=True)
        for x, y in batches() * 4:
            theirs.zero_grad()
            F.cross_entropy(one(x), y).backward()
            if clip:
                plain_clip(one, kind)
            theirs.step()
    spec = {"type": optimizer, "lr": 0.05, **CONFIGS[kind]}
    Classify(model=net, data=batches(), optimizers=spec, run={"max_steps": 32}, log=OFF).fit()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), plain.parameters(), strict=True))
    assert not torch.equal(net[0].weight, unclipped[0].weight), "the test must clip something"


class Gradients(Classify):
    """Keeps the gradients that each update saw, by a hook of torch."""

    def loss(self, batch: Any) -> Tensor:
        if not hasattr(self, "seen"):
            self.seen: list[list[Tensor]] = []
            self._assembled().owners["main"].optimizer.register_step_pre_hook(self._keep)
        return super().loss(batch)

    def _keep(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.seen.append([p.grad.clone() for p in self.model.parameters()])


@pytest.mark.parametrize("spec", [{"clip_value": 0.03}, {"agc": {"clip": 0.09}}, {"max_norm": 0.15}], ids=str)
def test_the_logged_norms_and_the_fraction_clipped_are_what_happened(spec: dict[str, Any], tmp_path: Path) -> None:
    run: dict[str, Any] = {"max_steps": 20, "dir": str(tmp_path)}
    log = {"every": 10, "sinks": ["jsonl"]}
    plain = {"type": "SGD", "lr": 0.3}
    clipped = Gradients(model=make_net(), data=batches(), optimizers={**plain, **spec}, run=run, log=log)
    result = clipped.fit()
    raw = replayed(clipped.seen)
    records = [json.loads(line) for line in (result.dir / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if "grad/main/post_clip" in str(record)]
    assert len(records) == 2
    for record, last in zip(records, (9, 19), strict=True):
        scalars = record.get("scalars", record)
        after = nn.utils.get_total_norm(clipped.seen[last]).item()
        assert scalars["grad/main/post_clip"] == pytest.approx(after, rel=1e-5)
        assert scalars["grad/total/post_clip"] == pytest.approx(after, rel=1e-5)
        changed = [
            any(not torch.equal(a, b) for a, b in zip(raw[i], clipped.seen[i], strict=True))
            for i in range(last - 9, last + 1)
        ]
        assert scalars["grad/main/clip_fraction"] == pytest.approx(sum(changed) / 10)
    assert any(changed), "the test must clip something"


def replayed(seen: list[list[Tensor]]) -> list[list[Tensor]]:
    """The unclipped gradients of a run of plain SGD whose clipped ones are known."""
    net, raw = make_net(), []
    for (x, y), gradients in zip(batches() * 3, seen, strict=False):
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()
        raw.append([p.grad.clone() for p in net.parameters()])
        optimizer = torch.optim.SGD(net.parameters(), lr=0.3, fused=True)
        for p, gradient in zip(net.parameters(), gradients, strict=True):
            p.grad = gradient.clone()
        optimizer.step()
    return raw


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_nan_is_never_spread(kind: str) -> None:
    data = batches(4)
    data[2][0][0, 0] = torch.nan
    net, without = make_net(), make_net()
    spec = {"type": "SGD", "lr": 0.1, **CONFIGS[kind]}
    skip = {"policy": "skip", "max_consecutive": 1}
    Classify(model=net, data=data, optimizers=spec, nonfinite=skip, run={"max_epochs": 1}, log=OFF).fit()
    Classify(model=without, data=data[:2] + data[3:], optimizers=spec, run={"max_epochs": 1}, log=OFF).fit()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), without.parameters(), strict=True))


class Transfers(TorchDispatchMode):
    """Counts what would make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in {torch.ops.aten._local_scalar_dense, torch.ops.aten.item}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", CONFIGS)
def test_between_two_logs_nothing_waits_for_the_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "_gate", lambda config, owners, device, *_: DeferredGate(owners.values(), device))
    spec = {"type": "SGD", "lr": 0.1, **CONFIGS[kind]}
    run = {"max_steps": FIRST_STEPS + 20}
    trainer = Classify(model=make_net(), data=batches(), optimizers=spec, run=run, log={"sinks": [], "every": 100})
    counts = []
    with Transfers() as transfers:
        trainer.model.register_forward_pre_hook(lambda *_: counts.append(transfers.count))
        trainer.fit()
    assert counts[FIRST_STEPS + 1] == counts[-1]


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ({"max_norm": 0.5}, "main  norm <= 0.5"),
        ({"clip_value": 0.5}, "main  each value <= 0.5"),
        ({"agc": {}}, "main  each unit <= 0.01 of its weights"),
    ],
)
def test_the_plan_says_how_an_owner_is_clipped(spec: dict[str, Any], line: str) -> None:
    run = {"max_steps": 1}
    plan = Classify(
        model=make_net(), data=batches(), optimizers={"type": "SGD", "lr": 1, **spec}, run=run, log=OFF
    ).plan()
    assert line in str(plan)
    assert plan.why().count("why: ") == len(plan.phases[0].nodes)


@pytest.mark.parametrize(
    ("spec", "code", "path"),
    [
        ({"max_norm": 1.0, "clip_value": 0.5}, "SL120", "optimizers.main.clip_value"),
        ({"agc": {}, "max_norm": 1.0}, "SL120", "optimizers.main.max_norm"),
        ({"agc": {"clip": 0}}, "SL104", "optimizers.main.agc.clip"),
        ({"agc": {"excpt": ["a"]}}, "SL101", "optimizers.main.agc.excpt"),
        ({"agc": 0.01}, "SL103", "optimizers.main.agc"),
        ({"clip_value": -1}, "SL104", "optimizers.main.clip_value"),
    ],
)
def test_what_cannot_be_meant_is_refused(spec: dict[str, Any], code: str, path: str) -> None:
    with pytest.raises(sl.FaultError, match=code) as caught:
        Classify(model=make_net(), data=batches(), optimizers={"type": "SGD", "lr": 1, **spec}, run={"max_steps": 1})
    assert path in caught.value.fault.where


def test_one_kind_beside_nulls_is_accepted() -> None:
    spec = {"type": "SGD", "lr": 1.0, "max_norm": None, "clip_value": 0.5, "agc": None}
    Classify(model=make_net(), data=batches(), optimizers=spec, run={"max_steps": 1}, log=OFF).fit()


def test_an_exception_that_matches_no_parameter_is_refused() -> None:
    spec = {"type": "SGD", "lr": 1.0, "agc": {"except": ["haed.*"]}}
    with pytest.raises(sl.FaultError, match="SL203") as caught:
        Classify(model=make_net(), data=batches(), optimizers=spec, run={"max_steps": 1}, log=OFF).fit()
    assert "agc.except" in caught.value.fault.where
