"""How faults write lists of names, counts and suggestions."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

_SHOWN = 6


def listed(names: Iterable[str], shown: int = _SHOWN) -> str:
    """The first `shown` names in backquotes, then how many more there are."""
    quoted = [f"`{name}`" for name in names]
    rest = len(quoted) - shown
    return ", ".join(quoted[:shown]) + (f" and {rest} more" if rest > 0 else "")


def counted(number: int, noun: str) -> str:
    """`1 tensor`, `2 tensors`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def agree(number: int, one: str, many: str) -> str:
    """The verb for a number of things: `is` or `are`."""
    return one if number == 1 else many


def suggestion(name: str, known: Sequence[str]) -> str:
    """`; the nearest name is ...`, or nothing where no name is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; the nearest name is `{near[0]}`" if near else ""
