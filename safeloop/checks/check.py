"""The base of every check: it looks for one pattern, has a code, and its docstring is the page of that code."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

from safeloop.faults import Fault, FaultError, Severity

if TYPE_CHECKING:
    from safeloop.autograd.tape import Call
    from safeloop.checks.events import Event, LoopState


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


class EventCheck(Check):
    """A check of the order in which things happen to gradients in a loop that is not ours; one instance a watch."""

    @abstractmethod
    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """Faults that show with this event; `state` is that from before it."""

    def close(self, state: LoopState) -> Iterator[Fault]:
        """Faults that only the end of the watch shows."""
        return iter(())


class CallCheck(Check):
    """A check of what torch functions are called with; one instance for a watch, heard on steps looked at in depth."""

    hears: ClassVar[frozenset[str]]
    """the functions that it wants to hear"""

    @abstractmethod
    def hear(self, call: Call) -> Iterator[Fault]:
        """Faults that show with this call, which has run."""
