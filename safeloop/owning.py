"""Who owns which parameter, and what updates it: built from the config or taken ready, and checked."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from safeloop.audit.ledger import FaultLedger
from safeloop.checks.config.values import ArgumentsRefused
from safeloop.checks.setup.keys import GroupKeyIgnored
from safeloop.checks.setup.rates import GroupRateZero, LearningRatesFarApart
from safeloop.checks.stages import setup_faults
from safeloop.checks.views import Ownership, SetupView
from safeloop.faults import Fault
from safeloop.ingredients import Ingredients
from safeloop.optim.owner import Owner, build_owner, ready_owner
from safeloop.optim.ownership import owned_by_identity, owned_by_patterns

if TYPE_CHECKING:
    from safeloop.config import Loaded


def own(given: Ingredients, ledger: FaultLedger) -> tuple[Ownership, dict[str, Owner]]:
    """Who updates what, and the owners by name; what the config freezes is frozen.

    Raises:
        FaultError: SL1 and SL2, whatever the optimizers or the patterns of their parameters get wrong.
    """
    model = given.model
    ownership = _ownership(given)
    ledger.add(_located(fault, given.loaded) for fault in setup_faults(SetupView(model, ownership)))
    for name, parameter in model.named_parameters():
        if name in ownership.frozen:
            parameter.requires_grad_(False)
    owners = _owners(given, ownership)
    optimizers = {name: owner.optimizer for name, owner in owners.items()}
    for check in (LearningRatesFarApart, GroupRateZero, GroupKeyIgnored):
        ledger.add(check.find(SetupView(model, ownership, optimizers)))
    return ownership, owners


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
    return replace(fault, where=f"{place} ({loaded.whole(path)})") if place else fault


def _owners(given: Ingredients, ownership: Ownership) -> dict[str, Owner]:
    if given.optimizers is not None:
        return {name: ready_owner(name, optimizer, given.model) for name, optimizer in given.optimizers.items()}
    parameters = dict(given.model.named_parameters())
    owners = {}
    for name, spec in (given.config.optimizers or {}).items():
        owned = {full: parameters[full] for full, owner in ownership.owner_of.items() if owner == name}
        try:
            owners[name] = build_owner(name, spec, owned, given.model, given.loaded.allow)
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise ArgumentsRefused.error(
                f"torch refuses `optimizers.{name}`: {error}",
                where=given.loaded.where(f"optimizers.{name}"),
                fix=f"change the arguments of `optimizers.{name}` ({spec.label})",
            ) from error
    return owners
