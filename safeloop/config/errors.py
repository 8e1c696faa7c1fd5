"""Everything that is wrong with a config, at once, each with its place and a caret."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence

from safeloop.config.nodes import Origin
from safeloop.faults import Fault, FaultError, printable

_WIDTH = 120
_CONTEXT = 40


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """A fault, where it is written, and the dotted path of the value."""

    fault: Fault
    at: Origin | None = None
    path: str = ""

    def placed(self) -> Fault:
        """The fault with its place in `where`."""
        where = " ".join(part for part in (str(self.at or ""), f"({self.path})" if self.path else "") if part)
        return dataclasses.replace(self.fault, where=where or self.fault.where)


class ConfigError(FaultError):
    """The config is refused. `str()` shows every problem with its line and a caret; nothing has run."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(sorted(dict.fromkeys(problems), key=_place))
        first, *rest = (problem.placed() for problem in self.problems)
        super().__init__(first, rest)
        self.args = (self.problems,)

    def __str__(self) -> str:
        count = "1 error" if len(self.problems) == 1 else f"{len(self.problems)} errors"
        codes = ", ".join(sorted({problem.fault.code for problem in self.problems}))
        return "\n\n".join(
            [*map(render, self.problems), f"{count}; nothing was run. More: safeloop explain CODE, for {codes}"]
        )


def render(problem: Problem) -> str:
    """One problem as a block: what, where, the line with a caret under the culprit, why, help."""
    fault, at = problem.fault, problem.at
    margin = " " * len(str(at.line)) if at and at.line else " "
    path = f"  ({problem.path})" if problem.path else ""
    lines = [f"{fault.severity}[{fault.code}]: {fault.what}"]
    if at or path:
        lines.append(f"{margin} --> {at or ''}{path}")
    if at and at.text.strip():
        text, caret = _underlined(at)
        lines += [f"{margin} |", f"{at.line or margin} | {text}", f"{margin} | {caret}"]
    for label, value in (("why", fault.why), ("help", fault.fix)):
        if value:
            head = f"{margin} = {label}: "
            lines += textwrap.wrap(
                head + value, _WIDTH, subsequent_indent=" " * len(head), break_long_words=False, break_on_hyphens=False
            )
    return "\n".join(printable(line.replace("\n", " ").replace("\r", " ")) for line in lines)


def _underlined(at: Origin) -> tuple[str, str]:
    """The line and the line under it, both cut to what surrounds the culprit; escapes are counted as they are shown."""
    start = max(0, at.column - 1 - _CONTEXT) if at.column + at.width > _WIDTH else 0
    before = ("..." if start else "") + at.text[start : at.column - 1]
    culprit = at.text[at.column - 1 :][: min(at.width, _WIDTH - _CONTEXT)]
    rest = at.text[at.column - 1 + len(culprit) :]
    room = max(0, _WIDTH - len(before) - len(culprit))
    after = rest if len(rest) <= room else rest[:room] + "..."
    before, culprit, after = (_one_line(part) for part in (before, culprit, after))
    return before + culprit + after, " " * len(before) + "^" * max(1, len(culprit))


def _one_line(text: str) -> str:
    return printable(text.replace("\t", " ").replace("\n", " ").replace("\r", " "))


def _place(problem: Problem) -> tuple[str, int, int]:
    return (problem.at.source, problem.at.line, problem.at.column) if problem.at else ("", 0, 0)
