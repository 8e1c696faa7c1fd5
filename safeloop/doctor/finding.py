"""What the doctor says: one thing that looks wrong in a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["serious", "warning", "note"]
LEVELS: tuple[Level, ...] = ("serious", "warning", "note")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that looks wrong.

    `serious` ends the command with 3, a `note` is no fault of the run. `what` is measured and says at which steps;
    `why` may rank causes; `fix` is an instruction; `config` is the path of the value to change, with the present one.
    """

    level: Level
    title: str
    what: str
    why: str
    fix: str
    config: str = ""
    rank: int = 0
    """within a level, larger is told first"""
