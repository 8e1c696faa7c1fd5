"""Reads what the user's loss function returned: a fast path for what is right, the checks for everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from safeloop.checks.source import Place
from safeloop.checks.stages import term_faults
from safeloop.checks.terms.values import TermIsNotATensor
from safeloop.checks.views import TermsView
from safeloop.faults import Fault, FaultError
from safeloop.penalties.request import Request
from safeloop.step.penalties import PenaltyReader, PenaltyRules
from safeloop.step.report import Frame


@dataclass(frozen=True)
class TermRules:
    """What the config says of loss terms, and what the checks need to know."""

    parameters: Mapping[str, nn.Parameter]
    owned: frozenset[str]
    source: str
    """where the loss function is defined"""
    weights: dict[str, float] = field(default_factory=dict)
    """term -> weight; those that follow a schedule are kept up to date here, for all who read them"""
    declared: Sequence[str] = ()
    constants_allowed: frozenset[str] = frozenset()
    """terms that may be constant on, or missing from, a batch"""
    trains: Mapping[str, Sequence[str]] = field(default_factory=dict)
    every: Mapping[str, int] = field(default_factory=dict)
    """term -> it counts only on the steps that this divides"""
    schedules: Mapping[str, WeightSchedule] = field(default_factory=dict)
    """term -> its weight as a function of the step"""
    penalties: PenaltyRules = field(default_factory=PenaltyRules)
    """what the config says of penalties"""

    def section(self, term: str) -> str:
        """The path of a term's section in the config."""
        return f"{'penalties' if term in self.penalties.sections else 'losses'}.{term}"

    def view(self, returned: Mapping[str, Any], *, is_first: bool) -> TermsView:
        """What the term checks look at; a declared term can only be missed on the first step."""
        return TermsView(
            terms=returned,
            weights=self.weights,
            declared=tuple(name for name in self.declared if name not in self.constants_allowed) if is_first else (),
            constants_allowed=self.constants_allowed,
            parameters=self.parameters,
            owned=self.owned,
            trains=self.trains,
            source=self.source,
            penalties=frozenset(self.penalties.sections),
        )


class Evidence(Protocol):
    """What the audit has seen of the terms while they were computed."""

    @property
    def made(self) -> Mapping[str, Place]:
        """The line that made each term."""

    @property
    def cuts(self) -> Mapping[str, str]:
        """Where the gradient path of a term was cut."""


class WeightSchedule(Protocol):
    """A weight that changes."""

    def at(self, step: int) -> float:
        """The weight on a step, counted from 0."""


class TermReader:
    """Turns returned terms into roots and seeds of one backward pass."""

    def __init__(self, rules: TermRules) -> None:
        self.rules = rules
        self.penalties = PenaltyReader(rules.penalties, rules.source)
        self._weights = rules.weights
        self._seeds: dict[str, Tensor] = {}
        self._owned = {id(rules.parameters[name]) for name in rules.owned if name in rules.parameters}

    def due(self, returned: Mapping[str, Any], step: int, *, is_audited: bool = False) -> Mapping[str, Any]:
        """The terms that count on this step, deferred ones and penalties computed now, in their order."""
        every, due = self.rules.every, {}
        for name, term in returned.items():
            if isinstance(term, Request):
                value = self.penalties.value(name, term, step, returned, is_audited=is_audited)
                if value is not None:
                    due[name] = value
            elif step % every.get(name, 1) == 0:
                due[name] = term() if _is_deferred(term) else term
        return due

    def weigh(self, step: int) -> None:
        """Set the weights that follow a schedule."""
        for name, schedule in self.rules.schedules.items():
            self._weights[name] = schedule.at(step)
            if name in self._seeds:
                self._seeds[name].fill_(self._weights[name])

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Go on with other weights."""
        self._weights.update(weights)
        for name, weight in weights.items():
            if name in self._seeds:
                self._seeds[name].fill_(weight)

    def read(self, returned: Mapping[str, Any], frame: Frame) -> bool:
        """Fill `frame` with roots, seeds and values; False where some term is not a plain differentiable scalar."""
        is_plain, owned = True, self._owned
        for name, term in returned.items():
            if (
                isinstance(term, Tensor)
                and term.requires_grad
                and term.dim() == 0
                and term.dtype.is_floating_point
                and (not term.is_leaf or id(term) in owned)
            ):
                self._take(frame, name, term, self._seed(name, term), term.detach())
            else:
                is_plain = False
        return is_plain

    def read_unusual(self, returned: Mapping[str, Any], frame: Frame) -> None:
        """The terms that `read` left: weighted tensors and permitted constants, after the checks have passed."""
        taken = set(frame.root_names)
        for name, term in returned.items():
            if name in taken:
                continue
            tensor, weights = term if isinstance(term, tuple) else (term, None)
            value = term_value(term)
            if tensor.requires_grad and (not tensor.is_leaf or id(tensor) in self._owned):
                self._take(frame, name, tensor, weights * self._weights.get(name, 1.0), value)
            else:
                _add(frame.terms, name, value, frame.share)
                frame.leave_out(name)

    @property
    def has_special(self) -> bool:
        """Whether some term is not due on every step or has a weight that changes."""
        return bool(self.rules.every or self.rules.schedules or self.rules.penalties.sections)

    def faults(self, returned: Mapping[str, Any], *, is_first: bool, evidence: Evidence | None = None) -> list[Fault]:
        """What the term checks say of these terms, most specific first; `evidence` is what a tape has seen of them."""
        view = self.rules.view(returned, is_first=is_first)
        if evidence is not None:
            view = replace(view, made=evidence.made, cuts=evidence.cuts)
        missing = self.penalties.missing() if is_first else []
        return [*missing, *term_faults(view)]

    def _take(self, frame: Frame, name: str, root: Tensor, seed: Tensor, value: Tensor) -> None:
        frame.roots.append(root)
        frame.root_names.append(name)
        frame.seeds.append(seed if frame.share is None else seed * frame.share)
        _add(frame.terms, name, value, frame.share)

    def _seed(self, name: str, term: Tensor) -> Tensor:
        seed = self._seeds.get(name)
        if seed is None or seed.dtype != term.dtype or seed.device != term.device:
            weight = self._weights.get(name, 1.0)
            seed = self._seeds[name] = torch.full((), weight, dtype=term.dtype, device=term.device)
        return seed


def no_mapping(returned: object, source: str) -> FaultError:
    """The fault of a loss function that returned something else than terms by name."""
    return TermIsNotATensor.error(
        f"the loss function returned a {type(returned).__name__} instead of loss terms by name",
        where=source,
        fix='return a dict: {"fit": loss}, or write `loss(self, batch)` for a single term',
    )


def term_value(term: Any) -> Tensor:
    """The value of a checked term, 0-d: a scalar, the sum of a weighted tensor, or what a callable gives."""
    term = term() if _is_deferred(term) else term
    value: Tensor = (term[0].detach() * term[1]).sum() if isinstance(term, tuple) else term.detach()
    return value


def _is_deferred(term: Any) -> bool:
    return callable(term) and not isinstance(term, (Tensor, nn.Module))


def _add(values: dict[str, Tensor], name: str, value: Tensor, share: float | None) -> None:
    if share is None:
        values[name] = value
    else:
        values[name] = values[name] + value * share if name in values else value * share
