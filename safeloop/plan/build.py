"""Derives the plan from config and names alone; what only a graph can tell, the backward node decides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from safeloop.plan.nodes import Backward, Clip, Finite, Forward, Node, Schedule, Term, Update, Zero
from safeloop.plan.plan import Phase, StepPlan


@dataclass(frozen=True, slots=True)
class OwnerFacts:
    """What the plan must know of an owner."""

    name: str
    optimizer: str
    max_norm: float | None = None
    scheduler: str | None = None
    note: str = ""


def build_plan(
    owners: Sequence[OwnerFacts],
    terms: Sequence[Term],
    *,
    is_open: bool = False,
    policy: str = "raise",
    is_deferred: bool = False,
    parameters: Sequence[str] = (),
) -> StepPlan:
    """The plan of a run without declared phases: one phase, `train`, that trains every owner.

    Args:
        owners: in the order in which they are updated.
        terms: the loss terms that are known beforehand.
        is_open: whether the loss function may return further terms.
        policy: what happens on a non-finite gradient: `raise` or `skip`.
        is_deferred: whether the finite check is read one step later, from a flag on the device.
        parameters: lines for the printed plan: who owns what.
    """
    name = "train"
    names = tuple(owner.name for owner in owners)
    nodes: list[Node] = [
        Zero(names),
        Forward(name, tuple(terms), is_open),
        Backward(name, tuple(terms), names, is_open),
        Finite(names, policy, is_deferred),
    ]
    nodes += (Clip(owner.name, owner.max_norm) for owner in owners if owner.max_norm is not None)
    for owner in owners:
        nodes += _update(owner, (name,))
    return StepPlan((Phase(name, tuple(nodes), names),), tuple(parameters))


def _update(owner: OwnerFacts, phases: tuple[str, ...]) -> Iterator[Node]:
    yield Update(owner.name, owner.optimizer, owner.max_norm is not None, owner.note, phases)
    if owner.scheduler is not None:
        yield Schedule(owner.name, owner.scheduler)
