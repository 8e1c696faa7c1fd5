"""The rules that the loss terms of each phase obey: their weights, what they train, when they are due."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from safeloop.ingredients import Ingredients, PhaseMethod
from safeloop.optim.owner import Owner
from safeloop.penalties.base import LazyWeight
from safeloop.step import Precision, TermReader, TermRules
from safeloop.step.penalties import PenaltyRules
from safeloop.weights import WeightRamp


def term_readers(
    given: Ingredients, owners: Mapping[str, Owner], precision: Precision, weights: dict[str, float]
) -> dict[str, TermReader]:
    """Phase -> what reads its terms. `weights`: loss term -> its present weight, which the readers keep up to date."""
    seen: set[str] = set()
    return {
        phase.name: TermReader(_rules(given, phase, owners, weights, _penalties(given, phase, owners, precision, seen)))
        for phase in given.phases
    }


def _trained(phase: PhaseMethod, owners: Mapping[str, Owner]) -> dict[str, nn.Parameter]:
    trained = owners.values() if phase.trains is None else [owners[name] for name in phase.trains]
    return {name: parameter for owner in trained for name, parameter in owner.parameters.items()}


def _penalties(
    given: Ingredients, phase: PhaseMethod, owners: Mapping[str, Owner], precision: Precision, seen: set[str]
) -> PenaltyRules:
    return PenaltyRules(
        given.config.penalties,
        tuple(_trained(phase, owners).values()),
        given.model,
        precision.scale,
        seen,
        is_last=phase is given.phases[-1],
    )


def _rules(
    given: Ingredients,
    phase: PhaseMethod,
    owners: Mapping[str, Owner],
    weights: dict[str, float],
    penalties: PenaltyRules,
) -> TermRules:
    """The rules for the terms of one phase; only a single phase can tell that a declared term is missing."""
    losses, config = given.config.losses, given.config
    owned = _trained(phase, owners)
    ramps = {name: section.weight for name, section in losses.items() if isinstance(section.weight, WeightRamp)}
    lazy = {name: LazyWeight(one) for name, one in config.penalties.items() if isinstance(one.weight, WeightRamp)}
    sections: dict[str, Any] = {**losses, **config.penalties}
    return TermRules(
        parameters={**dict(given.model.named_parameters()), **owned},
        owned=frozenset(owned),
        source=phase.source,
        weights=weights,
        declared=tuple(losses) if len(given.phases) == 1 else tuple(phase.terms),
        constants_allowed=frozenset(name for name, section in losses.items() if section.may_be_constant),
        trains={} if config.simultaneous else {n: s.trains for n, s in sections.items() if s.trains is not None},
        every={name: section.every for name, section in losses.items() if section.every > 1},
        schedules={**ramps, **lazy},
        penalties=penalties,
    )
