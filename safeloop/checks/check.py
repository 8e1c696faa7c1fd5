"""The base of every check: it looks for one pattern, has a code, and its docstring is the page of that code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from safeloop.faults import Fault, FaultError, Severity


class Check:
    """One pattern that safeloop catches.

    A subclass is named for what it catches, sets `code`, `title` and, where it is a warning, `severity`. Checks that
    look at a view have a `find(view)` that yields faults; the others are raised at the one place that can see the
    pattern.
    """

    code: ClassVar[str]
    title: ClassVar[str]
    severity: ClassVar[Severity] = "error"

    @classmethod
    def fault(
        cls,
        what: str,
        *,
        where: str = "",
        why: str = "",
        fix: str = "",
        severity: Severity | None = None,
        names: Sequence[str] = (),
    ) -> Fault:
        """This check's fault; `severity` overrides the class's own, `audit.accept` looks at `names`."""
        return Fault(cls.code, cls.title, what, where, why, fix, severity or cls.severity, tuple(names))

    @classmethod
    def error(cls, what: str, *, where: str = "", why: str = "", fix: str = "") -> FaultError:
        """This check's fault as an exception, ready to be raised."""
        return FaultError(cls.fault(what, where=where, why=why, fix=fix, severity="error"))
