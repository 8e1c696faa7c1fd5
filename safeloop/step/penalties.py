"""Computes the penalties that a phase returned, when they are due, on random numbers that do not depend on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from safeloop.checks.penalties.declared import DeclaredPenaltyMissing, PenaltyNotDeclared
from safeloop.checks.wording import listed, suggestion
from safeloop.faults import Fault
from safeloop.penalties.base import Penalty
from safeloop.penalties.inspection import Inspection
from safeloop.penalties.request import Request
from safeloop.seeds import isolated_rng
from safeloop.step.precision import GradientScale


@dataclass(frozen=True)
class PenaltyRules:
    """What the config says of penalties, for one phase."""

    sections: Mapping[str, Penalty] = field(default_factory=dict)
    """name -> what it is, for all phases"""
    trained: Sequence[Tensor] = ()
    """the parameters that the phase trains"""
    model: nn.Module | None = None
    """searched for modules that a penalty should not contain"""
    scale: GradientScale | None = None
    seen: set[str] = field(default_factory=set)
    """names that some phase has returned: one set for all phases"""
    is_last: bool = False
    """whether this is the last phase of a step: what has not come by then never comes"""


class PenaltyReader:
    """Turns the requests that a phase returns into loss terms."""

    def __init__(self, rules: PenaltyRules, source: str) -> None:
        self.rules = rules
        self.names: set[str] = set()
        """the penalties that this phase has returned"""
        self._source = source
        self._inspected: set[str] = set()
        self._noticed: list[Fault] = []

    def value(
        self, name: str, request: Request, step: int, beside: Iterable[str], *, is_audited: bool
    ) -> Tensor | None:
        """The penalty, 0-d; None where it is not due on this step.

        One that is not due on every step draws one number from torch's generator, due or not, and is computed on random
        numbers of its own: the stream of the run does not depend on when it is due.

        Args:
            name: its key among the returned terms.
            request: what was returned.
            step: counted from 0.
            beside: all keys that were returned, to suggest a name.
            is_audited: whether to look at its graph on the way.

        Raises:
            FaultError: SL430 to SL437.
        """
        penalty = self._section(name, request, beside)
        if penalty.every == 1:
            return self._computed(name, request, penalty, is_audited)
        seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
        if step % penalty.every:
            return None
        with isolated_rng(seed):
            return self._computed(name, request, penalty, is_audited)

    def taken(self) -> list[Fault]:
        """What was found while penalties were computed, once."""
        noticed, self._noticed = self._noticed, []
        return noticed

    def missing(self) -> list[Fault]:
        """A fault where penalties are declared that no phase has returned; for the last phase of the first step."""
        names = [name for name in self.rules.sections if name not in self.rules.seen]
        if not names or not self.rules.is_last:
            return []
        what = f"{listed(f'penalties.{name}' for name in names)} declared, and no loss function returned it"
        fix = f"return `self.penalty(...)` under the name `{names[0]}`, or take its section out"
        return [DeclaredPenaltyMissing.fault(what, where=self._source, fix=fix, names=names)]

    def _computed(self, name: str, request: Request, penalty: Penalty, is_audited: bool) -> Tensor:
        inspection = None
        if is_audited:
            is_first = name not in self._inspected
            inspection = Inspection(self.rules.trained, self.rules.model, is_first=is_first)
            self._inspected.add(name)
        scale = None if self.rules.scale is None else self.rules.scale.value
        value = request(name, penalty, scale=scale, inspection=inspection)
        self._noticed += [] if inspection is None else inspection.taken()
        return value

    def _section(self, name: str, request: Request, beside: Iterable[str]) -> Penalty:
        sections = self.rules.sections
        if name not in sections:
            returned = set(beside)
            near = suggestion(name, [known for known in sections if known not in returned])
            raise PenaltyNotDeclared.error(
                f"`{name}` is a penalty, and there is no section `penalties.{name}`{near}",
                where=f"{request.place}; loss function {self._source}",
                why="the section says which penalty it is",
                fix=f"add `penalties: {{{name}: {{type: gradient, target: 1.0, weight: 10.0}}}}` for WGAN-GP, "
                f"`{{type: r1, weight: 1.0}}` for R1",
            )
        self.names.add(name)
        self.rules.seen.add(name)
        return sections[name]
