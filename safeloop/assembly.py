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
from safeloop.checks.update.closure import ClosureRefused, ObjectiveNotFixed, TokensWithoutCount
from safeloop.checks.update.phases import OptimizerNeverTrained, PhaseTrainsNoOptimizer
from safeloop.checks.views import Ownership, SetupView
from safeloop.config.losses import WeightRamp
from safeloop.data.move import Mover
from safeloop.data.source import Source
from safeloop.evaluation import preserved
from safeloop.faults import Fault
from safeloop.optim.averaging import Average
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

_RESTLESS = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)

MAX_OVERFLOWS = 30
"""fp16 only: so many overflows in a row bring the gradient scale from 65536 below 1e-4: something else is wrong"""


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
    weights: Mapping[str, float]
    """loss term -> its present weight"""
    average: Average | None = None
    """the averaged weights; None where the config wants none"""


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
    ledger.add(closure_faults(given, owners))
    if config.accumulate.weight_by == "tokens" and given.count_tokens is None:
        raise given.loaded.error(
            TokensWithoutCount,
            "accumulate.weight_by",
            "`accumulate.weight_by` is `tokens`, and the Trainer has no `count_tokens`",
            fix="override `count_tokens(self, batch)`, or set `accumulate.weight_by: samples`",
        )
    precision = Precision(config.run.precision, device)
    gate = _gate(config, owners, device, precision)
    plan = _plan(given, owners, ownership, gate, precision)
    average = None if config.average is None else Average(config.average, model)
    weights = _weights(config)
    readers = {phase.name: TermReader(_rules(given, phase, owners, weights)) for phase in given.phases}
    observer = StepAudit(config.audit.level, ledger, model, ownership)
    losses = {phase.name: phase.losses for phase in given.phases}
    parts = Parts(
        model,
        losses,
        readers,
        owners,
        gate,
        observer,
        precision,
        "loss_at_cut" in config.log.grad_norms,
        shares_by(given),
        average,
    )
    program = Program(plan, parts)
    return Assembly(device, stream, owners, ownership, plan, program, gate, readers, precision, weights, average)


def probe(given: Ingredients, stream: Stream) -> dict[str, Mapping[str, Any]]:
    """What each phase's loss function returns for the first micro-batch; random state and buffers are then as before.

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
    exempt = {f"optimizers.{name}.agc.except": spec.agc.exempt for name, spec in specs.items() if spec.agc}
    patterns = {name: spec.params for name, spec in specs.items()}
    return owned_by_patterns(given.model, patterns, given.config.frozen, further=exempt)


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
    can_wait = config.average is None  # what is averaged must be known to be finite before
    can_wait = can_wait and all(owner.is_fused for owner in owners.values())
    if device.type == "cuda" and wanted.policy == "raise" and can_wait:
        return DeferredGate(owners.values(), device)
    return ImmediateGate(policy=wanted.policy, max_consecutive=wanted.max_consecutive)


def _plan(
    given: Ingredients,
    owners: Mapping[str, Owner],
    ownership: Ownership,
    gate: ImmediateGate | DeferredGate,
    precision: Precision,
) -> StepPlan:
    losses = given.config.losses
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
            tuple(tuple(losses[name].trains or ()) for name in phase.terms) if given.config.simultaneous else None,
        )
        for phase in given.phases
    ]
    return build_plan(
        [
            OwnerFacts(n, owner.kind, owner.limit, owner.schedule, _note(owner), owner.evaluations)
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
        ),
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
    return {name: section.first_weight for name, section in config.losses.items()}


def _rules(given: Ingredients, phase: PhaseMethod, owners: Mapping[str, Owner], weights: dict[str, float]) -> TermRules:
    """The rules for the terms of one phase; only a single phase can tell that a declared term is missing."""
    losses = given.config.losses
    trained = owners.values() if phase.trains is None else [owners[name] for name in phase.trains]
    owned = {name: parameter for owner in trained for name, parameter in owner.parameters.items()}
    return TermRules(
        parameters={**dict(given.model.named_parameters()), **owned},
        owned=frozenset(owned),
        source=phase.source,
        weights=weights,
        declared=tuple(losses) if len(given.phases) == 1 else tuple(phase.terms),
        constants_allowed=frozenset(name for name, section in losses.items() if section.may_be_constant),
        trains={} if given.config.simultaneous else {n: s.trains for n, s in losses.items() if s.trains is not None},
        every={name: section.every for name, section in losses.items() if section.every > 1},
        schedules={name: s.weight for name, s in losses.items() if isinstance(s.weight, WeightRamp)},
    )


def closure_faults(given: Ingredients, owners: Mapping[str, Owner]) -> list[Fault]:
    """What is wrong around optimizers that need a closure."""
    faults = []
    for name in [name for name, owner in owners.items() if owner.needs_closure]:
        where = given.loaded.where(f"optimizers.{name}") or f"optimizers.{name}"
        phases = [phase for phase in given.phases if phase.trains is None or name in phase.trains]
        reasons = [
            (
                len(phase.trains or owners) > 1,
                f"phase `{phase.name}` trains other optimizers beside it",
                "give it a phase of its own",
            )
            for phase in phases
        ]
        reasons += [(phase.repeat > 1, f"phase `{phase.name}` repeats", "set its `repeat` to 1") for phase in phases]
        reasons.append((owners[name].clipping is not None, "its gradients are clipped", "take the clipping out"))
        reasons.append(
            (given.config.run.precision == "fp16", "the run is in fp16", "use `run.precision: bf16` or fp32")
        )
        for is_so, what, fix in reasons:
            if is_so:
                faults.append(
                    ClosureRefused.fault(f"`{name}` is LBFGS, and {what}", where=where, fix=fix, names=[name])
                )
        restless = [n for n, m in given.model.named_modules() if m.training and isinstance(m, _RESTLESS)]
        if restless:
            faults.append(
                ObjectiveNotFixed.fault(
                    f"`{name}` is LBFGS, and these modules change its loss between evaluations: {_few(restless)}",
                    where=where,
                    fix="take them out, put them into eval mode, or train with another optimizer",
                    names=restless,
                )
            )
    return faults


def untrained(phases: Sequence[PhaseMethod], owners: Sequence[str]) -> list[Fault]:
    """Phases that train what is no optimizer, and optimizers that no phase trains."""
    faults = []
    for phase in phases:
        if strangers := [name for name in phase.trains or () if name not in owners]:
            near = get_close_matches(strangers[0], owners, 1)
            faults.append(
                PhaseTrainsNoOptimizer.fault(
                    f"phase `{phase.name}` trains `{strangers[0]}`; the optimizers are {', '.join(owners)}",
                    where=phase.source,
                    fix=(f"did you mean `{near[0]}`? " if near else "")
                    + "name optimizers of the `optimizers:` section",
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
