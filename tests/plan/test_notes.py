"""What a line of the printed plan says of its cost."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from safeloop.drafting import waits
from safeloop.optim.owner import Owner
from safeloop.plan import OwnerFacts, PhaseFacts, StepFacts, Term, build_plan
from safeloop.step import DeferredGate, ImmediateGate

PHASE = PhaseFacts("train", ("main",), (Term("loss"),))


@pytest.mark.parametrize("evaluations", [None, 20])
def test_the_finite_check_says_where_it_waits_for_the_device(evaluations: int | None) -> None:
    owners = [OwnerFacts("main", "AdamW", evaluations=evaluations)]
    here, there = (build_plan(owners, [PHASE], StepFacts(waits=waits)) for waits in (False, True))
    assert "sync" not in here.why()
    assert '"waits": true' in there.json()
    if evaluations is None:
        assert "policy raise, one sync: looked at before the update" in str(there)
        assert "without a sync only where" in there.why()


def test_a_check_that_is_read_later_waits_for_nothing() -> None:
    plan = build_plan([OwnerFacts("main", "AdamW")], [PHASE], StepFacts(is_deferred=True))
    assert "policy raise, read one step later\n" in str(plan)


def test_it_waits_only_for_another_device_and_only_where_it_looks_at_once() -> None:
    for device, gate, expected in (
        ("cpu", ImmediateGate(), False),
        ("meta", ImmediateGate(), True),
        ("meta", DeferredGate((), torch.device("cpu")), False),
    ):
        model = nn.Linear(2, 1, device=device)
        owner = Owner("main", torch.optim.SGD(model.parameters()), dict(model.named_parameters()))
        assert waits(gate, {"main": owner}) is expected
