"""Who came: which loss terms the phases returned, and which permitted ones have never reached a parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from safeloop.autograd.walk import reach
from safeloop.checks.terms.declared import DeclaredTermMissing
from safeloop.checks.terms.never import TermNeverActive
from safeloop.faults import Fault
from safeloop.step.report import Frame
from safeloop.step.terms import TermRules

PATIENCE = 100
"""a permitted term that reached no parameter on so many micro-batches is told of"""


class Attendance:
    """Keeps the list of terms over all phases of a run.

    Args:
        phases: their names.
        declared: the terms of the `losses:` section.
        permitted: those of them that may be constant on, or missing from, a batch.
        every: term -> it counts only on the steps that this divides.
    """

    def __init__(
        self,
        phases: Sequence[str],
        declared: Sequence[str] = (),
        permitted: frozenset[str] = frozenset(),
        every: Mapping[str, int] | None = None,
    ) -> None:
        self.permitted = permitted
        self.is_shared = len(phases) > 1
        """whether only all phases together can tell that a declared term is missing"""
        self._phases = tuple(phases)
        self._declared = tuple(name for name in declared if name not in permitted)
        self._every = dict(every or {})
        self._homes: dict[str, str] = {} if self.is_shared else dict.fromkeys(permitted, phases[0])
        self._dormant = dict.fromkeys(permitted, 0)
        self._answers: dict[str, Mapping[str, Any]] = {}

    def answer(self, phase: str, returned: Mapping[str, Any], rules: TermRules) -> list[Fault]:
        """Take what a phase returned for its first micro-batch; once all have, a fault for each missing term."""
        self._answers[phase] = returned
        if not self.is_shared or len(self._answers) < len(self._phases):
            return []
        everything = {name: term for answer in self._answers.values() for name, term in answer.items()}
        source = f"phases {', '.join(self._phases)}; the last is {rules.source}"
        view = replace(rules.view(everything, is_first=True), declared=self._declared, source=source)
        return list(DeclaredTermMissing.find(view))

    def note(self, phase: str, returned: Mapping[str, Any], rules: TermRules, frame: Frame) -> list[Fault]:
        """Count the permitted terms that are missing or reach no parameter; one fault for each that never reached any.

        Cost: a walk over the graph of a permitted term, 2 us for each node, until it has reached a parameter once.
        """
        faults = []
        for name in self.permitted:
            if frame.report.step % self._every.get(name, 1):
                continue
            if name in returned:
                self._homes.setdefault(name, phase)
            elif self._homes.get(name) == phase:
                frame.leave_out(name)
            if name in self._dormant and self._stays_dormant(name, rules, frame):
                del self._dormant[name]
                faults.append(_never(name, rules.source))
        return faults

    def may_be_missed_by(self, phase: str, frame: Frame) -> bool:
        """Whether a permitted term of this phase, or of nobody knows which, is left out of the present turn."""
        return any(
            self._homes.get(name, phase) == phase and (name not in frame.terms or name in frame.inactive)
            for name in self.permitted
        )

    def _stays_dormant(self, name: str, rules: TermRules, frame: Frame) -> bool:
        """Whether the patience with a dormant term ends here."""
        if name in frame.root_names:
            found = reach(frame.roots[frame.root_names.index(name)])
            owned = {rules.parameters[one] for one in rules.owned if one in rules.parameters}
            if not found.is_complete or not owned.isdisjoint(found.leaves):
                del self._dormant[name]
                return False
            frame.leave_out(name)
        self._dormant[name] += 1
        return self._dormant[name] >= PATIENCE


def _never(name: str, source: str) -> Fault:
    return TermNeverActive.fault(
        f"loss term `{name}` reached no parameter on any of its first {PATIENCE} micro-batches",
        where=source,
        why=f"`losses.{name}.may_be_constant` is true, so that a batch without it is no error; a name that is "
        "misspelt, a condition that never holds or a graph that is always cut looks the same",
        fix=f"correct the term or its name, or take `losses.{name}` out",
        names=(name,),
    )
