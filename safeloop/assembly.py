"""Puts a run together: data, owners, plan, program. What can be refused is refused here, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import is_lazy

from safeloop.audit.budget import Budget
from safeloop.audit.ledger import FaultLedger
from safeloop.audit.observer import StepAudit
from safeloop.audit.replay import TurnReplayer
from safeloop.checks.update.closure import TokensWithoutCount
from safeloop.checks.views import Ownership
from safeloop.data.move import Mover
from safeloop.drafting import draft_plan, exact_every, first_weights
from safeloop.evaluation import preserved
from safeloop.ingredients import Ingredients
from safeloop.optim.averaging import Average
from safeloop.optim.owner import Owner
from safeloop.owning import own
from safeloop.penalties.base import LazyWeight
from safeloop.plan import StepPlan
from safeloop.refusals import closure_faults, refuse_balance, refuse_epochs, untrained, watched_modules
from safeloop.step import DeferredGate, ImmediateGate, Parts, Precision, Program, TermReader
from safeloop.step.attendance import Attendance
from safeloop.step.bind import equal_shares
from safeloop.step.buffers import BufferKeeper
from safeloop.step.custom import custom_plan
from safeloop.step.watch import Watch
from safeloop.stream import EpochsSince, Stream
from safeloop.term_rules import term_readers

if TYPE_CHECKING:
    from safeloop.config.run import RunConfig


MAX_OVERFLOWS = 30
"""fp16 only: so many overflows in a row bring the gradient scale from 65536 below 1e-4: something else is wrong"""


@dataclass(frozen=True)
class Assembly:
    """A run that is ready to take its first step."""

    device: torch.device
    stream: Stream
    owners: Mapping[str, Owner]
    ownership: Ownership
    plan: StepPlan
    program: Program
    gate: ImmediateGate | DeferredGate
    readers: Mapping[str, TermReader]
    precision: Precision
    keeper: BufferKeeper | None
    weights: dict[str, float]
    """loss term -> its present weight"""
    audit: StepAudit
    attendance: Attendance
    epochs: EpochsSince
    """epochs that ended since its schedules began"""
    watch: Watch
    """measures gradients inside the forward"""
    replayer: TurnReplayer | None = None
    """explains what the finite check refuses; None at `audit.level: off`"""
    average: Average | None = None
    """the averaged weights; None where the config wants none"""


def assemble(given: Ingredients, device: torch.device, ledger: FaultLedger, after: Assembly | None = None) -> Assembly:
    """Check who owns what, build the owners and the plan, bind it.

    `after` is the first stage of a run in stages: what goes on from stage to stage is taken from it.

    Raises:
        FaultError: SL1, SL2 and SL6, whatever the config, the model and its owners get wrong.
    """
    config, model = given.config, given.model
    stream = after.stream if after else Stream(given.data, Mover(device), given.count, config.run.max_epochs)
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        probe(given, stream)
    ownership, owners = own(given, ledger)
    _refuse(given, owners, ledger)
    watch_modules = watched_modules(given)
    precision = after.precision if after else Precision(config.run.precision, device)
    gate = _gate(config, owners, device, precision)
    plan = draft_plan(given, owners, ownership, gate, precision)
    if given.custom is not None:
        plan = custom_plan(plan, tuple(owners))
    weights = after.weights if after else _first_weights(config)
    parts = Parts(
        model=model,
        losses={phase.name: phase.losses for phase in given.phases},
        readers=term_readers(given, owners, precision, weights),
        owners=owners,
        gate=gate,
        observer=(audit := _audit(given, ownership, owners, ledger)),
        precision=precision,
        measures_cut="loss_at_cut" in config.log.grad_norms,
        shares=shares_by(given),
        average=after.average if after else None if config.average is None else Average(config.average, model),
        epochs_over=(epochs := EpochsSince(stream)),
        exact_every=exact_every(config),
        keeper=BufferKeeper(model, depth=2 if gate.is_deferred else 1),
        attendance=(attendance := _attendance(given)),
        watch=(watch := Watch(watch_modules, precision.scale)),
        balance=config.balance,
        has_declared_phases=all(phase.trains is not None for phase in given.phases),
        custom=given.custom,
        combine=config.combine,
        seed=config.run.seed,
        replayer=(replayer := _replayer(given, precision)),
    )
    return Assembly(
        device,
        stream,
        owners,
        ownership,
        plan,
        Program(plan, parts),
        gate,
        parts.readers,
        precision,
        parts.keeper,
        weights,
        audit,
        attendance,
        epochs,
        watch,
        replayer,
        parts.average,
    )


def _refuse(given: Ingredients, owners: Mapping[str, Owner], ledger: FaultLedger) -> None:
    """What cannot be trained so is refused before anything is bound."""
    ledger.add(untrained(given.phases, list(owners)))
    refuse_epochs(given, owners)
    ledger.add(closure_faults(given, owners))
    refuse_balance(given)
    if given.config.accumulate.weight_by == "tokens" and given.count_tokens is None:
        raise given.loaded.error(
            TokensWithoutCount,
            "accumulate.weight_by",
            "`accumulate.weight_by` is `tokens`, and the Trainer has no `count_tokens`",
            fix="override `count_tokens(self, batch)`, or set `accumulate.weight_by: samples`",
        )


def _audit(given: Ingredients, ownership: Ownership, owners: Mapping[str, Owner], ledger: FaultLedger) -> StepAudit:
    config = given.config
    return StepAudit(
        Budget(config.audit.level, config.audit.budget),
        ledger,
        given.model,
        ownership,
        given.holders,
        permitted=[name for name, section in config.losses.items() if section.may_be_constant],
        optimizers={name: owner.optimizer for name, owner in owners.items()},
        are_separate=config.simultaneous,
    )


def _replayer(given: Ingredients, precision: Precision) -> TurnReplayer | None:
    if given.config.audit.level == "off" or given.custom is not None:
        return None
    return TurnReplayer(given.model, is_scaled=precision.scale is not None)


def _first_weights(config: RunConfig) -> dict[str, float]:
    return first_weights(config) | {name: LazyWeight(one).at(0) for name, one in config.penalties.items()}


def redraft_plan(given: Ingredients, assembly: Assembly, returned: Mapping[str, Sequence[str]]) -> StepPlan:
    """The plan with the terms that `@phase` methods returned, which the config does not name.

    Args:
        given: what the user brings.
        assembly: what was made of it.
        returned: phase -> names of the terms that came for the first micro-batch.
    """
    phases = [
        replace(phase, terms=returned[phase.name], is_open=False) if phase.is_open and not phase.terms else phase
        for phase in given.phases
    ]
    known = replace(given, phases=phases)
    return draft_plan(known, assembly.owners, assembly.ownership, assembly.gate, assembly.precision)


def probe(
    given: Ingredients, stream: Stream, read: Callable[[str, Any], Any] = lambda phase, returned: returned
) -> dict[str, Any]:
    """What each phase's loss function returns for the first micro-batch; random state and buffers are then as before.

    Lazy parameters take their shapes here. Whatever else the user's function changes stays changed.

    Args:
        given: what the user brings.
        stream: where micro-batches come from.
        read: makes something of what a phase returned while its graph still holds: the buffers are not yet restored.
    """
    batch = stream.peek()
    with preserved(given.model), torch.enable_grad():
        return {phase.name: read(phase.name, phase.losses(batch)) for phase in given.phases}


def shares_by(given: Ingredients) -> Callable[[Sequence[Any]], list[float]]:
    """The part of a window that each of its micro-batches is, by what `accumulate.weight_by` counts."""
    weight_by = given.config.accumulate.weight_by
    count = {"samples": given.count, "tokens": given.count_tokens}.get(weight_by)
    if count is None:
        return equal_shares

    def shares(window: Sequence[Any]) -> list[float]:
        counts = [count(batch) for batch in window]
        total = sum(counts)
        return [one / total for one in counts] if total else equal_shares(window)

    return shares


def _gate(
    config: RunConfig, owners: Mapping[str, Owner], device: torch.device, precision: Precision
) -> ImmediateGate | DeferredGate:
    wanted = config.nonfinite
    if precision.scale is not None:
        return ImmediateGate(policy="skip", max_consecutive=wanted.max_consecutive or MAX_OVERFLOWS)
    can_wait = config.average is None  # what is averaged must be known to be finite before
    can_wait = can_wait and all(owner.is_fused for owner in owners.values())
    if device.type == "cuda" and wanted.policy == "raise" and can_wait:
        return DeferredGate(owners.values(), device)
    return ImmediateGate(policy=wanted.policy, max_consecutive=wanted.max_consecutive)


def _attendance(given: Ingredients) -> Attendance:
    losses = given.config.losses
    return Attendance(
        [phase.name for phase in given.phases],
        list(losses),
        frozenset(name for name, section in losses.items() if section.may_be_constant),
        {name: section.every for name, section in losses.items() if section.every > 1},
    )
