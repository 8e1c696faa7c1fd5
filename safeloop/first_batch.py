"""Checks the loss terms of the first micro-batch, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from safeloop.assembly import Assembly
from safeloop.audit.ledger import FaultLedger
from safeloop.checks.terms.kinds import TermIsNotFinite
from safeloop.checks.views import GradientsView
from safeloop.step.terms import no_mapping, term_value

Probe = Callable[[Callable[[str, Any], Any]], Mapping[str, Any]]
"""Calls each phase's loss function once; by phase, what the given function makes of the phase and what it returned."""


def check_terms(assembly: Assembly, probe: Probe, ledger: FaultLedger) -> dict[str, tuple[str, ...]]:
    """The names of the terms that each phase returned; what is wrong with them goes into the ledger.

    Raises:
        FaultError: the first error, with all others of its stage.
    """
    names: dict[str, tuple[str, ...]] = {}

    def read(phase: str, returned: Any) -> Any:
        reader = assembly.readers[phase]
        if not isinstance(returned, Mapping):
            raise no_mapping(returned, reader.rules.source)
        names[phase] = tuple(returned)
        ledger.add(assembly.attendance.answer(phase, returned, reader.rules))
        return reader.due(returned, 0, is_audited=True)

    for phase, due in probe(read).items():
        reader = assembly.readers[phase]
        ledger.add(reader.penalties.taken())
        ledger.add(reader.faults(due, is_first=True))
        values = {name: term_value(term) for name, term in due.items()}
        ledger.add(TermIsNotFinite.find(GradientsView({}, values, 0, reader.rules.source)))
    return names
