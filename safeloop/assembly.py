"""Puts a run together: data, owners, plan, program. What can be refused is refused here, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from safeloop.audit.ledger import FaultLedger
from safeloop.audit.observer import StepAudit
from safeloop.checks.config.values import ArgumentsRefused
from safeloop.checks.stages import setup_faults
from safeloop.checks.update.phases import OptimizerNeverTrained, PhaseTrainsNoOptimizer
from safeloop.checks.views import Ownership, SetupView
from safeloop.data.move import Mover
from safeloop.data.source import Source
from safeloop.evaluation import preserved
from safeloop.faults import Fault
from safeloop.optim.owner import Owner, build_owner, ready_owner
from safeloop.optim.ownership import owned_by_identity, owned_by_patterns
from safeloop.plan import OwnerFacts, PhaseFacts, StepFacts, StepPlan, Term, build_plan
from safeloop.step import DeferredGate, ImmediateGate, Parts, Precision, Program, TermReader, TermRules
from safeloop.step.bind import equal_shares
from safeloop.stream import Stream

if TYPE_CHECKING:
    from safeloop.config import Loaded
    from safeloop.config.run import RunConfig

Losses = Callable[[Any], Mapping[str, Any]]

MAX_OVERFLOWS = 30
"""fp16 only: after so many overflows in a row the gradient scale has fallen from 65536 below 1e-4: something else is wrong"""


@dataclass(frozen=True)
class PhaseMethod:
    """A loss function of the user's, and which owners it trains when."""

    name: str
    losses: Losses
    source: str
    """where it is defined"""
    terms: Sequence[str]
    """loss terms that are known beforehand"""
    is_open: bool
    """whether it may return further terms"""
    trains: Sequence[str] | None = None
    """names of owners; None: all"""
    repeat: int = 1
    every: int = 1


@dataclass(frozen=True)
class Ingredients:
    """What the user brings: objects and methods, whether from code or from a config."""

    loaded: Loaded
    model: nn.Module
    data: Source
    phases: Sequence[PhaseMethod]
    count: Callable[[Any], int]
    """samples in a micro-batch"""
    count_tokens: Callable[[Any], int] | None = None
    """tokens in a micro-batch; None: the user does not say"""
    optimizers: Mapping[str, Optimizer] | None = None
    """ready optimizers; None: the config's are built"""

    @property
    def config(self) -> RunConfig:
        """The validated config."""
        return self.loaded.config


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


def assemble(given: Ingredients, device: torch.device, ledger: FaultLedger) -> Assembly:
    """Check who owns what, build the owners and the plan, bind it.

    Raises:
        FaultError: SL1, SL2 and SL6, whatever the config, the model and its owners get wrong.
    """
    config, model = given.config, given.model
    stream = Stream(given.data, Mover(device), given.count, config.run.max_epochs)
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        probe(given, stream)
    ownership = _ownership(given)
    ledger.add(_located(fault, given.loaded) for fault in setup_faults(SetupView(model, ownership)))
    for name, parameter in model.named_parameters():
        if name in ownership.frozen:
            parameter.requires_grad_(False)
    owners = _owners(given, ownership)
    ledger.add(untrained(given.phases, list(owners)))
    precision = Precision(config.run.precision, device)
    gate = _gate(config, owners, device, precision)
    plan = _plan(given, owners, ownership, gate, precision)
    readers = {phase.name: TermReader(_rules(given, phase, owners)) for phase in given.phases}
    observer = StepAudit(config.audit.level, ledger, model, ownership)
    losses = {phase.name: phase.losses for phase in given.phases}
    parts = Parts(model, losses, readers, owners, gate, observer, precision, shares_by(given))
    return Assembly(device, stream, owners, ownership, plan, Program(plan, parts), gate, readers, precision)


def probe(given: Ingredients, stream: Stream) -> dict[str, Mapping[str, Any]]:
    """What each phase's loss function returns for the first micro-batch; random state and buffers are as before afterwards.

    Lazy parameters take their shapes here. Whatever else the user's function changes stays changed.
    """
    batch = stream.peek()
    with preserved(given.model), torch.enable_grad():
        return {phase.name: phase.losses(batch) for phase in given.phases}


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


def _ownership(given: Ingredients) -> Ownership:
    if given.optimizers is not None:
        return owned_by_identity(given.model, given.optimizers, given.config.frozen)
    specs = given.config.optimizers or {}
    return owned_by_patterns(given.model, {name: spec.params for name, spec in specs.items()}, given.config.frozen)


def _located(fault: Fault, loaded: Loaded) -> Fault:
    """The fault with file, line and column, where it is about a value of the config."""
    path = fault.where.strip("`")
    place = loaded.where(path)
    return replace(fault, where=f"{place} ({path})") if place else fault


def _owners(given: Ingredients, ownership: Ownership) -> dict[str, Owner]:
    if given.optimizers is not None:
        return {name: ready_owner(name, optimizer, given.model) for name, optimizer in given.optimizers.items()}
    parameters = dict(given.model.named_parameters())
    owners = {}
    for name, spec in (given.config.optimizers or {}).items():
        owned = {full: parameters[full] for full, owner in ownership.owner_of.items() if owner == name}
        try:
            owners[name] = build_owner(name, spec, owned, given.model)
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise ArgumentsRefused.error(
                f"torch refuses `optimizers.{name}`: {error}",
                where=given.loaded.where(f"optimizers.{name}"),
                fix=f"change the arguments of `optimizers.{name}` (type {spec.type})",
            ) from error
    return owners


def _gate(
    config: RunConfig, owners: Mapping[str, Owner], device: torch.device, precision: Precision
) -> ImmediateGate | DeferredGate:
    wanted = config.nonfinite
    if precision.scale is not None:
        return ImmediateGate(policy="skip", max_consecutive=wanted.max_consecutive or MAX_OVERFLOWS)
    if device.type == "cuda" and wanted.policy == "raise" and all(owner.is_fused for owner in owners.values()):
        return DeferredGate(owners.values(), device)
    return ImmediateGate(policy=wanted.policy, max_consecutive=wanted.max_consecutive)


def _plan(
    given: Ingredients,
    owners: Mapping[str, Owner],
    ownership: Ownership,
    gate: ImmediateGate | DeferredGate,
    precision: Precision,
) -> StepPlan:
    weights = _weights(given.config)
    accumulate = given.config.accumulate
    phases = [
        PhaseFacts(
            phase.name,
            tuple(owners) if phase.trains is None else tuple(phase.trains),
            tuple(Term(name, weights.get(name, 1.0)) for name in phase.terms),
            phase.is_open,
            phase.repeat,
            phase.every,
        )
        for phase in given.phases
    ]
    return build_plan(
        [OwnerFacts(n, owner.kind, owner.max_norm, owner.schedule, _note(owner)) for n, owner in owners.items()],
        phases,
        StepFacts(gate.policy, gate.is_deferred, precision.scale is not None, accumulate.micro_batches, accumulate.weight_by),
        parameters=_parameter_lines(given.model, owners, ownership),
    )


def _note(owner: Owner) -> str:
    groups = len(owner.optimizer.param_groups)
    return f"{groups} param groups" if groups > 1 else ""


def _parameter_lines(model: nn.Module, owners: Mapping[str, Owner], ownership: Ownership) -> list[str]:
    lines = []
    for name, owner in owners.items():
        values = sum(tensor.numel() for tensor in owner.tensors)
        lines.append(f"{name}: {len(owner.tensors)} tensors, {values:,} values")
    if ownership.frozen:
        lines.append(f"frozen: {_few(ownership.frozen)}")
    lines += [f"tied: {name} = {', '.join(others)}" for name, others in ownership.tied.items()]
    return lines


def _few(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _weights(config: RunConfig) -> dict[str, float]:
    return {name: section.weight for name, section in config.losses.items()}


def _rules(given: Ingredients, phase: PhaseMethod, owners: Mapping[str, Owner]) -> TermRules:
    """The rules for the terms of one phase; with several phases, a declared term is looked for at the end of the step."""
    losses = given.config.losses
    trained = owners.values() if phase.trains is None else [owners[name] for name in phase.trains]
    owned = {name: parameter for owner in trained for name, parameter in owner.parameters.items()}
    return TermRules(
        parameters={**dict(given.model.named_parameters()), **owned},
        owned=frozenset(owned),
        source=phase.source,
        weights=_weights(given.config),
        declared=tuple(losses) if len(given.phases) == 1 else tuple(phase.terms),
        constants_allowed=frozenset(name for name, section in losses.items() if section.may_be_constant),
        trains={name: section.trains for name, section in losses.items() if section.trains is not None},
    )


def untrained(phases: Sequence[PhaseMethod], owners: Sequence[str]) -> list[Fault]:
    """Phases that train what is no optimizer, and optimizers that no phase trains."""
    faults = []
    for phase in phases:
        if strangers := [name for name in phase.trains or () if name not in owners]:
            near = get_close_matches(strangers[0], owners, 1)
            faults.append(
                PhaseTrainsNoOptimizer.fault(
                    f"phase `{phase.name}` trains `{strangers[0]}`; the optimizers are {', '.join(f'`{o}`' for o in owners)}",
                    where=phase.source,
                    fix=(f"did you mean `{near[0]}`? " if near else "") + "name optimizers of the `optimizers:` section",
                    names=strangers,
                )
            )
    trained = {name for phase in phases for name in (owners if phase.trains is None else phase.trains)}
    if idle := [name for name in owners if name not in trained]:
        faults.append(
            OptimizerNeverTrained.fault(
                f"no phase trains `{idle[0]}`",
                where=f"optimizers.{idle[0]}",
                why="its parameters would keep their initial values for ever",
                fix=f"add `{idle[0]}` to the `trains` of a phase, or list its parameters under `frozen:`",
                names=idle,
            )
        )
    return faults
