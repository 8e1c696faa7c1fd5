"""Faults: what safeloop says when something is wrong. A value first, an exception where the policy says so."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning"]

_WIDTH = 120
_EXIT_CODES = (("SL1", 2), ("SL80", 4), ("SL85", 6), ("SL86", 6), ("SL9", 5))


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing caught: what was measured, where, why it happens and how to mend it.

    `what` is measured, never guessed. `why` may rank causes. `fix` is an instruction. Empty parts are left out of
    the text. `names` are the parameters, modules or terms concerned, for `audit.accept`.
    """

    code: str
    title: str
    what: str
    where: str = ""
    why: str = ""
    fix: str = ""
    severity: Severity = "error"
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = f"{self.code} {self.title}" + (" (warning)" if self.severity == "warning" else "")
        parts = {"what": self.what, "where": self.where, "why": self.why, "fix": self.fix}
        parts["more"] = f"safeloop explain {self.code}"
        return "\n".join([head, *(_part(name, text) for name, text in parts.items() if text)])


def _part(name: str, text: str) -> str:
    indent = " " * 9
    lines = [
        wrapped
        for line in printable(text).splitlines()
        for wrapped in textwrap.wrap(line, _WIDTH - len(indent), break_long_words=False, break_on_hyphens=False) or [""]
    ]
    return f"  {name:<5}  " + f"\n{indent}".join(lines)


def printable(text: str) -> str:
    """`text` with control characters escaped, so that a value from a config cannot drive the terminal that shows it."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def exit_code(code: str) -> int:
    """The exit status of a command that ends in a fault: 2 config, 3 training, 4 checkpoint, 5 ranks, 6 data."""
    return next((status for prefix, status in _EXIT_CODES if code.startswith(prefix)), 3)


class FaultError(Exception):
    """Raised before any parameter has changed; `fault` is the most specific of its stage, `others` the rest."""

    def __init__(self, fault: Fault, others: Sequence[Fault] = ()) -> None:
        super().__init__(fault, tuple(others))
        self.fault = fault
        self.others = tuple(others)

    @property
    def exit_code(self) -> int:
        """The exit status of a command that ends in this error."""
        return exit_code(self.fault.code)

    def __str__(self) -> str:
        return "\n\n".join(str(fault) for fault in (self.fault, *self.others))
