"""The lessons that are about the step: rows 5 to 8 and 23, with the values that plain PyTorch gives."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import safeloop as sl
from safeloop.autograd import engine as entry
from safeloop.plan import Backward, Finite, Forward, Node, Phase, StepPlan, Term, Update, Zero
from safeloop.step.attendance import PATIENCE

OFF: dict[str, Any] = {"sinks": []}
SGD: dict[str, Any] = {"type": "SGD", "lr": 0.1}


def trainer(model: nn.Module, compute: Any, data: Any = None, **sections: Any) -> sl.Trainer:
    class Run(sl.Trainer):
        def losses(self, batch: Any) -> Any:
            returned = compute(self.model, batch)
            return returned if isinstance(returned, dict) else {"rank": returned}

    sections = {"optimizers": SGD, "run": {"max_steps": 1}, "log": OFF, **sections}
    return Run(model=model, data=data or [torch.ones(4, 3)], **sections)


def fault_of(run: sl.Trainer) -> sl.Fault:
    before = copy.deepcopy(run.model.state_dict())
    with pytest.raises(sl.FaultError) as caught:
        run.fit()
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())
    return caught.value.fault


# ------------------------------------------------------------------------------------------------------------- row 5


def leaf_cure(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    return {"fit": model(batch).square().mean(), "margin": torch.tensor(0.0, requires_grad=True)}


def test_row_5_plain_torch_says_nothing_to_a_constant_leaf() -> None:
    model = nn.Linear(3, 1)
    torch.tensor(0.0, requires_grad=True).backward()
    assert model.weight.grad is None


def test_row_5_a_constant_leaf_is_refused_and_named() -> None:
    fault = fault_of(trainer(nn.Linear(3, 1), leaf_cure))
    assert fault.code == "SL409"
    assert fault.names == ("margin",)
    assert "is a leaf" in fault.what
    assert "losses.margin.may_be_constant" in fault.fix


def test_row_5_a_term_that_is_rightly_constant_is_counted(tmp_path: Path) -> None:
    def losses(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        fit = model(batch).square().mean()
        return {"fit": fit, "margin": fit * 0.5 if batch.sum() > 20 else torch.tensor(0.0)}

    data = [torch.ones(4, 3), torch.full((4, 3), 2.0), torch.ones(4, 3), torch.ones(4, 3)]
    sections: dict[str, Any] = {
        "losses": {"margin": {"may_be_constant": True}},
        "log": {"every": 4, "sinks": ["jsonl"]},
    }
    result = trainer(nn.Linear(3, 1), losses, data, run={"max_steps": 4, "dir": tmp_path}, **sections).fit()
    assert result.faults == ()
    assert result.dir is not None
    record = json.loads((result.dir / "metrics.jsonl").read_text().splitlines()[0])
    assert record["safety/inactive/margin"] == 0.75


def test_row_5_a_term_that_never_left_zero_is_warned_of_once_and_named() -> None:
    def losses(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        out = model(batch)
        return {"fit": out.square().mean(), "margin": torch.clamp(out.mean() - 100, min=0)}

    (fault,) = trainer(nn.Linear(3, 1), losses, run={"max_steps": 25}).fit().faults
    assert (fault.code, fault.severity) == ("SL424", "warning")
    assert fault.names == ("margin",)


@pytest.mark.parametrize("constant", [torch.tensor(0.0), torch.tensor(0.0, requires_grad=True)], ids=["plain", "leaf"])
@pytest.mark.parametrize(("steps", "codes"), [(PATIENCE - 1, []), (PATIENCE + 20, ["SL415"])])
def test_row_5_a_permitted_constant_that_never_reached_a_parameter_is_warned_of(
    constant: Tensor, steps: int, codes: list[str]
) -> None:
    def losses(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        return {"fit": model(batch).square().mean(), "margin": constant}

    allowed = {"margin": {"may_be_constant": True}}
    faults = trainer(nn.Linear(3, 1), losses, run={"max_steps": steps}, losses=allowed).fit().faults
    assert [fault.code for fault in faults] == codes
    assert all(fault.names == ("margin",) for fault in faults)


@pytest.mark.parametrize("fused", [True, False])
def test_row_5_adamw_decays_a_zero_gradient_and_leaves_alone_what_has_none(fused: bool) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Parameter(torch.tensor(1.0))
            self.idle = nn.Parameter(torch.tensor(1.0))

    adamw = {"type": "AdamW", "lr": 0.1, "weight_decay": 0.1, "fused": fused}
    unreached, zeroed = Pair(), Pair()
    trainer(unreached, lambda m, _: m.used * 1.0, optimizers=adamw, run={"max_steps": 3}).fit()
    assert unreached.idle.grad is None
    assert unreached.idle.item() == 1.0
    trainer(zeroed, lambda m, _: m.used * 1.0 + m.idle * 0.0, optimizers=adamw, run={"max_steps": 3}).fit()
    assert zeroed.idle.item() == pytest.approx(0.99**3, rel=1e-6)


# ------------------------------------------------------------------------------------------------------------- row 6

MARGIN = 0.2


def triplets() -> list[Tensor]:
    """Anchor, positive and negative: `[3, 4, 3]`."""
    generator = torch.Generator().manual_seed(0)
    anchor = torch.randn(4, 3, generator=generator)
    noise = 0.1 * torch.randn(4, 3, generator=generator)
    return [torch.stack([anchor, anchor + noise, torch.randn(4, 3, generator=generator)])]


def gaps(model: nn.Module, batch: Tensor) -> list[Tensor]:
    anchor, positive, negative = model(batch)
    return [
        F.cosine_similarity(a, n, dim=0) - F.cosine_similarity(a, p, dim=0) + MARGIN
        for a, p, n in zip(anchor, positive, negative, strict=True)
    ]


def added_to_a_leaf(model: nn.Module, batch: Tensor) -> Any:
    loss = torch.tensor(0.0, requires_grad=True)
    for gap in gaps(model, batch):
        loss += torch.clamp(gap, min=0)
    return loss


def python_max(model: nn.Module, batch: Tensor) -> Any:
    loss = 0
    for gap in gaps(model, batch):
        loss += max(0, gap - 5)
    return loss


def constant_max(model: nn.Module, batch: Tensor) -> Any:
    loss = torch.tensor(0.0)
    for gap in gaps(model, batch):
        loss = loss + max(torch.tensor(0.0), gap - 5)
    return loss


def leaf_max(model: nn.Module, batch: Tensor) -> Any:
    return max(torch.tensor(0.0, requires_grad=True), sum(gaps(model, batch)) - 20)


@pytest.mark.parametrize(
    ("losses", "code", "says"),
    [
        (added_to_a_leaf, "SL301", "sum(terms)"),
        (python_max, "SL402", "clamp"),
        (constant_max, "SL404", "torch.clamp"),
        (leaf_max, "SL409", "start sums from a plain 0"),
    ],
)
def test_row_6_a_ranking_loss_summed_the_wrong_way_is_reported(losses: Any, code: str, says: str) -> None:
    fault = fault_of(trainer(nn.Linear(3, 2), losses, triplets()))
    assert fault.code == code
    assert says in fault.fix
    assert "test_lessons_step.py" in fault.where


def test_row_6_the_right_way_trains_and_rests_without_a_fault_when_every_pair_is_apart() -> None:
    def ranking(model: nn.Module, batch: Tensor) -> Tensor:
        return torch.stack([torch.clamp(gap, min=0) for gap in gaps(model, batch)]).mean()

    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    start = ranking(model, *triplets()).item()
    result = trainer(model, ranking, triplets(), run={"max_steps": 200}, log={**OFF, "every": 200}).fit()
    assert start > 0.05
    assert result.losses["rank"] < 0.2 * start
    assert result.faults == ()
    resting = trainer(model, lambda m, b: torch.clamp(torch.stack(gaps(m, b)) - 5, min=0).sum(), triplets())
    before = copy.deepcopy(model.state_dict())
    assert resting.fit().faults == ()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# ------------------------------------------------------------------------------------------------------------- row 7


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4))
        self.left, self.right = nn.Linear(4, 1), nn.Linear(4, 1)


def two_losses(model: Any, batch: Tensor) -> dict[str, Tensor]:
    hidden = torch.tanh(model.trunk(batch))
    return {"left": model.left(hidden).square().mean(), "right": (model.right(hidden) - 1).square().mean()}


OWNERS: dict[str, Any] = {
    "one": {**SGD, "momentum": 0.9, "params": ["trunk.*", "left.*"]},
    "two": {"type": "Adam", "lr": 0.01, "params": "rest"},
}


def test_row_7_two_losses_over_a_shared_graph_are_one_pass_that_frees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Shared().double()
    plain = copy.deepcopy(model)
    batches = [batch.double() for batch in torch.randn(5, 8, 3, generator=torch.Generator().manual_seed(2))]
    one = torch.optim.SGD([*plain.trunk.parameters(), *plain.left.parameters()], lr=0.1, momentum=0.9)
    two = torch.optim.Adam(plain.right.parameters(), lr=0.01)
    for batch in batches:
        one.zero_grad()
        two.zero_grad()
        terms = two_losses(plain, batch)
        terms["left"].backward(retain_graph=True)
        terms["right"].backward()
        one.step()
        two.step()

    passes: list[dict[str, Any]] = []
    kept: list[Tensor] = []
    engine = torch.autograd.backward
    assert entry._is_usable()
    enter = entry._run
    monkeypatch.setattr(torch.autograd, "backward", lambda *a, **k: (passes.append(k), engine(*a, **k))[1])
    monkeypatch.setattr(entry, "_run", lambda *a, **k: (passes.append({"retain_graph": a[2]}), enter(*a, **k))[1])

    def losses(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        terms = two_losses(model, batch)
        kept[:] = terms.values()
        return terms

    run = trainer(model, losses, batches, optimizers=OWNERS, run={"max_steps": 5}, log={**OFF, "grad_norms": ["total"]})
    run.fit()
    assert len(passes) == 5
    assert not any(options.get("retain_graph") for options in passes)
    for term in kept:
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            engine(term)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-14)


def test_row_7_the_plan_says_why_nothing_is_retained() -> None:
    sections = {"left": {"weight": 2.0}, "right": {"weight": 0.5}}
    plan = trainer(Shared(), two_losses, optimizers=OWNERS, losses=sections).plan()
    (backward,) = [node for node in plan.phases[0].nodes if isinstance(node, Backward)]
    assert backward.owners == ("one", "two")
    assert "2 left + 0.5 right" in str(plan)
    assert "graph freed" in str(plan)
    assert "nothing to retain" in plan.why()


# ------------------------------------------------------------------------------------------------------------- row 8


def test_row_8_plain_torch_refuses_a_step_between_two_backwards_only_where_it_can_see_it() -> None:
    """With a fused optimizer it says nothing, and the gradient is another one."""
    gradients = []
    for is_early, fused in ((False, True), (True, True), (True, False)):
        model = Shared()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
        terms = two_losses(model, torch.ones(4, 3))
        terms["left"].backward(retain_graph=True)
        if is_early:
            optimizer.step()
        optimizer.zero_grad()
        if not fused:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                terms["right"].backward()
            continue
        terms["right"].backward()
        gradients.append(model.trunk[0].weight.grad)
    right, wrong = gradients
    assert not torch.allclose(right, wrong, rtol=0.1)


ZERO = Zero(("one", "two"))
FORWARD = Forward("train", (Term("left"), Term("right")))
BACKWARDS = {name: Backward("train", (Term(term),), (name,)) for name, term in (("one", "left"), ("two", "right"))}
FINITES = {name: Finite((name,)) for name in ("one", "two")}
UPDATES = {name: Update(name, "SGD", phases=("train",)) for name in ("one", "two")}


def is_right(order: tuple[Node, ...]) -> bool:
    """Each update has finite gradients of its own, and each backward a graph that is whole and fresh."""
    graph_events = [node for node in order if isinstance(node, (Forward, Backward, Update))]
    places = {node: index for index, node in enumerate(order)}
    in_line = all(places[BACKWARDS[n]] < places[FINITES[n]] < places[UPDATES[n]] for n in UPDATES)
    pairs = itertools.pairwise([None, *graph_events])
    return in_line and all(isinstance(a, Forward) for a, b in pairs if isinstance(b, Backward))


def test_row_8_of_all_orders_of_two_optimizers_exactly_the_right_ones_can_be_planned() -> None:
    """Both cures can: all gradients first, or forward again; an update between a forward and its backward cannot."""
    nodes = (FORWARD, FORWARD, *BACKWARDS.values(), *FINITES.values(), *UPDATES.values())
    orders = set(itertools.permutations(nodes))
    assert len(orders) == 20160
    cures = set()
    for order in orders:
        try:
            StepPlan((Phase("train", (ZERO, *order), ("one", "two")),))
        except sl.FaultError as error:
            assert error.fault.code == "SL601"
            assert not is_right(order), [node.verb for node in order]
        else:
            assert is_right(order), [node.verb for node in order]
            first = order.index(min(UPDATES.values(), key=order.index))
            cures.add(sum(isinstance(node, Backward) for node in order[:first]))
    assert cures == {1, 2}


def test_row_8_over_one_forward_the_second_backward_finds_no_graph() -> None:
    pieces: tuple[Node, ...] = (*BACKWARDS.values(), *FINITES.values(), *UPDATES.values())
    for order in itertools.permutations(pieces):
        with pytest.raises(sl.FaultError, match="SL601"):
            StepPlan((Phase("train", (ZERO, FORWARD, *order), ("one", "two")),))


# ------------------------------------------------------------------------------------------------------------ row 23


def test_row_23_a_leaf_written_between_forward_and_backward_is_named_with_its_line() -> None:
    def losses(model: Any, batch: Tensor) -> Tensor:
        loss = model(batch).square().mean()
        model.weight.add_(1)
        return loss

    fault = fault_of(trainer(nn.Linear(3, 1), losses))
    assert fault.code == "SL301"
    assert "`model.weight` (parameter `weight`)" in fault.what
    assert "model.weight.add_(1)" in fault.where
    assert "test_lessons_step.py" in fault.where
    assert "no_grad" in fault.fix


def test_row_23_the_same_under_no_grad_is_seen_by_the_backward_pass() -> None:
    class Run(sl.Trainer):
        def loss(self, batch: Tensor) -> Tensor:
            first, second = self.model
            loss = second(torch.tanh(first(batch))).square().mean()
            with torch.no_grad():
                second.weight.add_(1)
            return loss

    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    before = copy.deepcopy(net[0].state_dict())
    with pytest.raises(sl.FaultError) as caught:
        Run(model=net, data=[torch.ones(4, 3)], optimizers=SGD, run={"max_steps": 1}, log=OFF).fit()
    assert caught.value.fault.code == "SL303"
    assert "second.weight.add_(1)" in caught.value.fault.where
    assert all(torch.equal(tensor, before[name]) for name, tensor in net[0].state_dict().items())
