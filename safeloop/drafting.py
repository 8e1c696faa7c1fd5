"""The plan of a run, from its config, its owners and its phases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from safeloop.checks.views import Ownership
from safeloop.ingredients import Ingredients
from safeloop.optim.owner import Owner
from safeloop.plan import OwnerFacts, PhaseFacts, StepFacts, StepPlan, Term, build_plan
from safeloop.step import DeferredGate, ImmediateGate, Precision
from safeloop.step.compiling import compiled_parts

if TYPE_CHECKING:
    from safeloop.config.run import RunConfig


def draft_plan(
    given: Ingredients,
    owners: Mapping[str, Owner],
    ownership: Ownership,
    gate: ImmediateGate | DeferredGate,
    precision: Precision,
) -> StepPlan:
    """The plan; raises SL601 where it would be out of order."""
    sections: dict[str, Any] = {**given.config.losses, **given.config.penalties}
    accumulate = given.config.accumulate
    phases = [
        PhaseFacts(
            phase.name,
            tuple(owners) if phase.trains is None else tuple(phase.trains),
            tuple(_term(given.config, name) for name in phase.terms),
            phase.is_open,
            phase.repeat,
            phase.every,
            tuple(tuple(sections[name].trains or ()) for name in phase.terms) if given.config.simultaneous else None,
        )
        for phase in given.phases
    ]
    return build_plan(
        [
            OwnerFacts(n, owner.kind, owner.limit, owner.schedule, _note(owner), owner.evaluations, owner.pace)
            for n, owner in owners.items()
        ],
        phases,
        StepFacts(
            gate.policy,
            gate.is_deferred,
            precision.scale is not None,
            accumulate.micro_batches,
            accumulate.weight_by,
            None if given.config.average is None else str(given.config.average),
            exact_every(given.config),
            None if given.config.balance is None else (given.config.balance.every, given.config.balance.at),
            None if given.config.combine is None else (str(given.config.combine), given.config.combine.at),
            waits=waits(gate, owners),
        ),
        parameters=[
            *_parameter_lines(given.model, owners, ownership),
            *_compile_lines(given),
            *_curvature_lines(given),
        ],
    )


def wants_several_passes(config: RunConfig) -> bool:
    """Whether several backward passes go through one graph."""
    return config.simultaneous or config.combine is not None or config.log.exact_term_norms is not None


def waits(gate: ImmediateGate | DeferredGate, owners: Mapping[str, Owner]) -> bool:
    """Whether the finite check makes the host wait for a device."""
    is_elsewhere = any(tensor.device.type != "cpu" for owner in owners.values() for tensor in owner.tensors)
    return is_elsewhere and not gate.is_deferred


def _term(config: RunConfig, name: str) -> Term:
    penalty = config.penalties.get(name)
    if penalty is None:
        return Term(name, first_weights(config).get(name, 1.0))
    return Term(name, penalty.first_weight, penalty.order, penalty.every, penalty.formula)


def exact_every(config: RunConfig) -> int | None:
    """Steps between exact norms of each term's gradient, for the log or the balance; None: they are not wanted."""
    wanted = [] if config.log.exact_term_norms is None else [config.log.exact_term_norms.every]
    if config.balance is not None and config.balance.at == "parameters":
        wanted.append(config.balance.every)
    return math.gcd(*wanted) if wanted else None


def _note(owner: Owner) -> str:
    groups = len(owner.optimizer.param_groups)
    notes = [f"{groups} param groups"] if groups > 1 else []
    if owner.metric is not None:
        notes.append(f"{owner.schedule} by `{owner.metric}` after each evaluation")
    return ", ".join(notes)


def _parameter_lines(model: nn.Module, owners: Mapping[str, Owner], ownership: Ownership) -> list[str]:
    lines = []
    for name, owner in owners.items():
        values = sum(tensor.numel() for tensor in owner.tensors)
        lines.append(f"{name}: {len(owner.tensors)} tensors, {values:,} values")
    if ownership.frozen:
        lines.append(f"frozen: {_few(ownership.frozen)}")
    lines += [f"tied: {name} = {', '.join(others)}" for name, others in ownership.tied.items()]
    return lines


def _compile_lines(given: Ingredients) -> list[str]:
    backend = given.config.run.compile_backend
    return [] if backend is None else [f"compiled with {backend}, in place: {_few(list(compiled_parts(given.model)))}"]


def _curvature_lines(given: Ingredients) -> list[str]:
    """What the readings cost, for the printed plan."""
    section = given.config.log.curvature
    if section is None:
        return []
    gradients = 2 + 2 * section.products * len(section.of)
    return [f"curvature: {', '.join(section.of)} every {section.every} steps, about {gradients} gradients each time"]


def _few(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def first_weights(config: RunConfig) -> dict[str, float]:
    """Loss term -> its weight on the first step, of those that the config names."""
    return {name: section.first_weight for name, section in config.losses.items()}
