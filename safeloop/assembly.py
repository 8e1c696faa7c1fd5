"""Puts a run together: data, owners, plan, program. What can be refused is refused here, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from safeloop.audit.ledger import FaultLedger
from safeloop.audit.observer import StepAudit
from safeloop.checks.config.values import ArgumentsRefused
from safeloop.checks.stages import setup_faults
from safeloop.checks.views import Ownership, SetupView
from safeloop.data.move import Mover
from safeloop.data.source import Source
from safeloop.evaluation import preserved
from safeloop.optim.owner import Owner, build_owner, ready_owner
from safeloop.optim.ownership import owned_by_identity, owned_by_patterns
from safeloop.plan import StepPlan, Term, build_plan
from safeloop.plan.build import OwnerFacts
from safeloop.step import DeferredGate, ImmediateGate, Parts, Program, TermReader, TermRules
from safeloop.stream import Stream

if TYPE_CHECKING:
    from safeloop.config import Loaded
    from safeloop.config.run import RunConfig

Losses = Callable[[Any], Mapping[str, Any]]


@dataclass(frozen=True)
class Ingredients:
    """What the user brings: objects and methods, whether from code or from a config."""

    loaded: Loaded
    model: nn.Module
    data: Source
    losses: Losses
    count: Callable[[Any], int]
    """samples in a micro-batch"""
    source: str
    """where the loss function is defined"""
    terms: Sequence[str]
    """loss terms that are known beforehand"""
    is_open: bool
    """whether the loss function may return further terms"""
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
    reader: TermReader


def assemble(given: Ingredients, device: torch.device, ledger: FaultLedger) -> Assembly:
    """Check who owns what, build the owners and the plan, bind it.

    Raises:
        FaultError: SL1 and SL2, whatever the config, the model and its owners get wrong.
    """
    config, model = given.config, given.model
    stream = Stream(given.data, Mover(device), given.count, config.run.max_epochs)
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        probe(model, given.losses, stream)
    ownership = _ownership(given)
    ledger.add(setup_faults(SetupView(model, ownership)))
    for name, parameter in model.named_parameters():
        if name in ownership.frozen:
            parameter.requires_grad_(False)
    owners = _owners(given, ownership)
    gate = _gate(config, owners, device)
    plan = _plan(given, owners, ownership, gate)
    reader = TermReader(_rules(given, owners))
    observer = StepAudit(config.audit.level, ledger, model, ownership)
    program = Program(plan, Parts(model, given.losses, owners, reader, gate, observer))
    return Assembly(device, stream, owners, ownership, plan, program, gate, reader)


def probe(model: nn.Module, losses: Losses, stream: Stream) -> Mapping[str, Any]:
    """What the loss function returns for the first micro-batch; random state and buffers are as before afterwards.

    Lazy parameters take their shapes here. Whatever else the user's function changes stays changed.
    """
    batch = stream.peek()
    with preserved(model), torch.enable_grad():
        return losses(batch)


def _ownership(given: Ingredients) -> Ownership:
    if given.optimizers is not None:
        return owned_by_identity(given.model, given.optimizers, given.config.frozen)
    specs = given.config.optimizers or {}
    return owned_by_patterns(given.model, {name: spec.params for name, spec in specs.items()}, given.config.frozen)


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


def _gate(config: RunConfig, owners: Mapping[str, Owner], device: torch.device) -> ImmediateGate | DeferredGate:
    wanted = config.nonfinite
    if device.type == "cuda" and wanted.policy == "raise" and all(owner.is_fused for owner in owners.values()):
        return DeferredGate(owners, device)
    return ImmediateGate(owners, policy=wanted.policy, max_consecutive=wanted.max_consecutive)


def _plan(
    given: Ingredients, owners: Mapping[str, Owner], ownership: Ownership, gate: ImmediateGate | DeferredGate
) -> StepPlan:
    weights = _weights(given.config)
    facts = [
        OwnerFacts(name, owner.kind, owner.max_norm, owner.schedule, _note(owner)) for name, owner in owners.items()
    ]
    return build_plan(
        facts,
        [Term(name, weights.get(name, 1.0)) for name in given.terms],
        is_open=given.is_open,
        policy=given.config.nonfinite.policy,
        is_deferred=gate.is_deferred,
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


def _rules(given: Ingredients, owners: Mapping[str, Owner]) -> TermRules:
    losses = given.config.losses
    owned = {name: parameter for owner in owners.values() for name, parameter in owner.parameters.items()}
    return TermRules(
        parameters={**dict(given.model.named_parameters()), **owned},
        owned=frozenset(owned),
        source=given.source,
        weights=_weights(given.config),
        declared=tuple(losses),
        constants_allowed=frozenset(name for name, section in losses.items() if section.may_be_constant),
        trains={name: section.trains for name, section in losses.items() if section.trains is not None},
    )
