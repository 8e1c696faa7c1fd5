"""All orders of six nodes: each accepted one trains like the plain loop, each refused one says what is missing."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from safeloop.audit.budget import Budget
from safeloop.audit.ledger import FaultLedger
from safeloop.audit.observer import StepAudit
from safeloop.checks.views import Ownership
from safeloop.faults import FaultError
from safeloop.optim.clipping import ClipByNorm
from safeloop.optim.owner import Owner
from safeloop.plan import Backward, Clip, Finite, Forward, Node, Phase, StepPlan, Term, Update, Zero
from safeloop.plan.combine import CombinedBackward
from safeloop.plan.simultaneous import SeparateBackward
from safeloop.step import ImmediateGate, Parts, Precision, Program, TermReader, TermRules, run_step

OWNERS = ("main",)
NODES: tuple[Node, ...] = (
    Zero(OWNERS),
    Forward("train", (Term("loss"),)),
    Backward("train", (Term("loss"),), OWNERS),
    Finite(OWNERS),
    Clip("main", 0.5),
    Update("main", "SGD", is_clipped=True, phases=("train",)),
)


def batches() -> list[torch.Tensor]:
    return list(torch.randn(5, 8, 3, generator=torch.Generator().manual_seed(1)))


def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def plain_loop() -> nn.Module:
    model, optimizer = model_and_optimizer()
    for batch in batches():
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return model


def run_plan(plan: StepPlan) -> nn.Module:
    model, optimizer = model_and_optimizer()
    parameters = dict(model.named_parameters())
    owners = {"main": Owner("main", optimizer, parameters, clipping=ClipByNorm(0.5))}
    ownership = Ownership(dict.fromkeys(parameters, "main"))
    reader = TermReader(TermRules(parameters, frozenset(parameters), source="here"))
    observer = StepAudit(Budget("full"), FaultLedger(), model, ownership)
    losses = {"train": lambda x: {"loss": model(x).square().mean()}}
    precision = Precision("fp32", torch.device("cpu"))
    parts = Parts(model, losses, {"train": reader}, owners, ImmediateGate(), observer, precision)
    program = Program(plan, parts)
    data = iter(batches())
    for step in range(5):
        run_step(program, lambda: next(data), step)
    return model


def test_of_all_720_orders_the_accepted_ones_equal_the_plain_loop_and_the_others_say_what_is_missing() -> None:
    expected = plain_loop().state_dict()
    accepted = 0
    for order in itertools.permutations(NODES):
        try:
            plan = StepPlan((Phase("train", order, OWNERS),))
        except FaultError as error:
            assert error.fault.code == "SL601"
            assert "missing: " in error.fault.what
            assert "node " in error.fault.where
            assert error.fault.fix
            continue
        accepted += 1
        for name, tensor in run_plan(plan).state_dict().items():
            assert torch.equal(tensor, expected[name]), [node.verb for node in order]
    assert accepted == 2, "zero and forward may change places; everything else has one place"


@pytest.mark.parametrize("left_out", range(6))
def test_a_plan_with_any_node_left_out_is_refused(left_out: int) -> None:
    nodes = NODES[:left_out] + NODES[left_out + 1 :]
    with pytest.raises(FaultError, match="SL601"):
        StepPlan((Phase("train", nodes, OWNERS),))


def test_a_refusal_names_the_node_that_would_mend_it() -> None:
    zero, forward, backward, finite, clip, update = NODES
    with pytest.raises(FaultError) as caught:
        StepPlan((Phase("train", (zero, forward, backward, clip, finite, update), OWNERS),))
    assert "`clip`" in caught.value.fault.what
    assert "the gradients of `main` are checked to be finite" in caught.value.fault.what
    assert "`finite`" in caught.value.fault.fix


def test_a_repeated_phase_is_checked_in_its_second_turn_too() -> None:
    StepPlan((Phase("train", NODES, OWNERS, repeat=5),))


def split(owner: str, kind: type[Backward] = Backward) -> tuple[Node, ...]:
    term = (Term(f"loss_{owner}"),)
    rest = {SeparateBackward: [((f"{owner}.*",),)], CombinedBackward: ["pcgrad", "cut"]}.get(kind, [])
    return Forward("train", term), kind("train", term, (owner,), False, None, *rest)


@pytest.mark.parametrize("kind", [Backward, SeparateBackward, CombinedBackward])
def test_two_backward_passes_in_one_phase_cannot_be_run(kind: type[Backward]) -> None:
    """They were run, and each gave its gradients to every owner."""
    ends = [node for owner in ("a", "b") for node in (Finite((owner,)), Update(owner, "SGD"))]
    plan = StepPlan((Phase("train", (Zero(("a", "b")), *split("a"), *split("b", kind), *ends), ("a", "b")),))
    with pytest.raises(FaultError) as caught:
        run_plan(plan)
    assert caught.value.fault.code == "SL601"
    assert "2 nodes" in caught.value.fault.what


def test_what_stands_between_forward_and_backward_would_be_done_for_each_micro_batch() -> None:
    """A zero there is right for one micro-batch, and would forget all but the last of a window."""
    zero, forward, backward, *rest = NODES
    StepPlan((Phase("train", (forward, zero, backward, *rest), OWNERS),))
    with pytest.raises(FaultError) as caught:
        StepPlan((Phase("train", (forward, zero, backward, *rest), OWNERS, micro_batches=2),))
    assert caught.value.fault.code == "SL601"
    assert "`zero`" in caught.value.fault.what
