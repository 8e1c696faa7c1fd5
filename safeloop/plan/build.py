"""Derives the plan from config and names alone; what only a graph can tell, the backward node decides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from safeloop.plan.average import Average
from safeloop.plan.balance import Balance
from safeloop.plan.closure import ClosureUpdate
from safeloop.plan.combine import CombinedBackward
from safeloop.plan.node import Node, Term
from safeloop.plan.nodes import Adapt, Backward, Clip, Finite, Forward, Schedule, Unscale, Update, Zero
from safeloop.plan.plan import Phase, StepPlan
from safeloop.plan.simultaneous import SeparateBackward


@dataclass(frozen=True, slots=True)
class OwnerFacts:
    """What the plan must know of an owner."""

    name: str
    optimizer: str
    clipping: tuple[float, str] | None = None
    """limit and kind, as the clip node has them"""
    scheduler: str | None = None
    note: str = ""
    evaluations: int | None = None
    """how often its update may compute the loss; None: once, before the update"""
    pace: str = "step"
    """after what its schedule moves: `step`, `epoch`, or `evaluation`, which is no part of a step"""


@dataclass(frozen=True, slots=True)
class PhaseFacts:
    """What the plan must know of a phase."""

    name: str
    trains: tuple[str, ...]
    terms: tuple[Term, ...]
    is_open: bool = False
    """whether its loss function may return further terms"""
    repeat: int = 1
    every: int = 1
    separate: tuple[tuple[str, ...], ...] | None = None
    """simultaneous: patterns of what each term trains, as `terms`; None: all terms in one pass"""


@dataclass(frozen=True, slots=True)
class StepFacts:
    """What holds for every phase."""

    policy: str = "raise"
    """what happens on a non-finite gradient: `raise` or `skip`"""
    is_deferred: bool = False
    """whether the finite check is read one step later, from a flag on the device"""
    is_scaled: bool = False
    """whether gradients are scaled (fp16)"""
    micro_batches: int = 1
    weight_by: str = "samples"
    average: str | None = None
    """the rule by which weights are averaged over steps"""
    exact_every: int | None = None
    """steps between two exact measurements of each term's gradient norm"""
    balance: tuple[int, str] | None = None
    """steps between two adjustments of the terms' weights, and where norms are measured; None: they stay"""
    combine: tuple[str, str] | None = None
    """rule by which the terms' gradients are combined, and where: `parameters` or `cut`; None: summed"""
    waits: bool = False
    """whether the host must wait for the device before an update"""


def build_plan(
    owners: Sequence[OwnerFacts],
    phases: Sequence[PhaseFacts],
    step: StepFacts | None = None,
    *,
    parameters: Sequence[str] = (),
) -> StepPlan:
    """The plan of a run: its phases in order, each of which trains some of the owners; then what is done once a step.

    Args:
        owners: in the order in which they are updated.
        phases: in the order in which they run.
        step: what holds for every phase.
        parameters: lines for the printed plan: who owns what.
    """
    step = step or StepFacts()
    names = tuple(phase.name for phase in phases)
    trained = {name for phase in phases for name in phase.trains}
    closing: list[Node] = [
        Schedule(o.name, o.scheduler, o.pace)
        for o in owners
        if o.scheduler is not None and o.pace != "evaluation" and o.name in trained
    ]
    if step.is_scaled:
        closing.append(Adapt(tuple(owner.name for owner in owners if owner.name in trained)))
    if step.average is not None:
        closing.append(Average(step.average))
    built = [_phase(phase, [o for o in owners if o.name in phase.trains], owners, step, names) for phase in phases]
    return StepPlan(tuple(built), tuple(closing), tuple(parameters))


def _phase(
    phase: PhaseFacts,
    trained: Sequence[OwnerFacts],
    owners: Sequence[OwnerFacts],
    step: StepFacts,
    phases: tuple[str, ...],
) -> Phase:
    return Phase(
        name=phase.name,
        nodes=tuple(_nodes(phase, trained, step, phases)),
        trains=tuple(owner.name for owner in trained),
        repeat=phase.repeat,
        every=phase.every,
        micro_batches=step.micro_batches,
        weight_by=step.weight_by,
        frozen=tuple(owner.name for owner in owners if owner not in trained),
    )


def _nodes(phase: PhaseFacts, owners: Sequence[OwnerFacts], step: StepFacts, phases: tuple[str, ...]) -> Iterator[Node]:
    names = tuple(owner.name for owner in owners)
    if closures := [owner for owner in owners if owner.evaluations is not None]:
        yield _closure(phase, closures[0], step)
        return
    yield Zero(names)
    yield Forward(phase.name, phase.terms, phase.is_open)
    backward = (phase.name, phase.terms, names, phase.is_open, step.exact_every)
    if phase.separate is not None:
        yield SeparateBackward(*backward, phase.separate)
    elif step.combine is not None and (phase.is_open or len(phase.terms) > 1):
        yield CombinedBackward(*backward, *step.combine)
    else:
        yield Backward(*backward)
    if step.is_scaled:
        yield Unscale(names)
    yield Finite(names, step.policy, step.is_deferred, step.is_scaled, step.waits)
    for owner in owners:
        if owner.clipping is not None:
            yield Clip(owner.name, *owner.clipping)
    for owner in owners:
        yield Update(owner.name, owner.optimizer, owner.clipping is not None, owner.note, phases)
    if step.balance is not None and (phase.is_open or len(phase.terms) > 1):
        yield Balance(phase.name, *step.balance)


def _closure(phase: PhaseFacts, owner: OwnerFacts, step: StepFacts) -> ClosureUpdate:
    names = (owner.name,)
    inner = (
        Zero(names),
        Forward(phase.name, phase.terms, phase.is_open),
        Backward(phase.name, phase.terms, names, phase.is_open, step.exact_every),
        Finite(names, waits=step.waits),
    )
    return ClosureUpdate(owner.name, owner.optimizer, inner, owner.evaluations or 1)
