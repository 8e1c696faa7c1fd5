"""What becomes of a fault: accepted, recorded once with a count, or raised."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from safeloop.faults import Fault, FaultError

_NUMBERED = re.compile(r"\b(?:step|iteration) \d+")
"""What tells two sights of one fault apart and is none of it."""

Listener = Callable[[Fault, int, int], None]
"""Called with a fault, the step, and how often it was seen: at the first time only, and again at the end of the run."""


class FaultLedger:
    """All faults of a run, each once with a count.

    Args:
        accept: code -> name patterns; a fault is accepted when every name that it is about matches one of them, `*`
        accepts
            the code as a whole. An accepted fault is not recorded and never raised.
    """

    def __init__(self, accept: Mapping[str, Sequence[str]] | None = None) -> None:
        self._accept = dict(accept or {})
        self._counts: dict[Fault, int] = {}
        self._keys: dict[tuple[str, str, str], Fault] = {}
        self.listener: Listener | None = None

    @property
    def faults(self) -> tuple[Fault, ...]:
        """Every fault so far, in the order of its first appearance."""
        return tuple(self._counts)

    @property
    def counts(self) -> Mapping[Fault, int]:
        """How often each was seen."""
        return self._counts

    def add(self, faults: Iterable[Fault], step: int = 0) -> None:
        """Record the faults of one stage.

        Raises:
            FaultError: where one of them is of severity error: the first of these, with all the rest in `others`.
        """
        found = [fault for fault in faults if not self.accepts(fault)]
        for fault in found:
            self._record(fault, step)
        errors = [fault for fault in found if fault.severity == "error"]
        if errors:
            raise FaultError(errors[0], [fault for fault in found if fault is not errors[0]])

    def raised(self, error: FaultError, step: int = 0) -> None:
        """Record the faults of an error that is on its way to the user."""
        for fault in (error.fault, *error.others):
            if fault not in self._counts:
                self._record(fault, step)

    def accepts(self, fault: Fault) -> bool:
        """Whether the user accepts this fault."""
        patterns = self._accept.get(fault.code, ())
        if "*" in patterns:
            return True
        return bool(fault.names) and all(any(fnmatchcase(name, p) for p in patterns) for name in fault.names)

    def _record(self, fault: Fault, step: int) -> None:
        known = self._keys.setdefault((fault.code, _NUMBERED.sub("", fault.where), " ".join(fault.names)), fault)
        self._counts[known] = self._counts.get(known, 0) + 1
        if self.listener is not None and self._counts[known] == 1:
            self.listener(known, step, 1)
