"""Backward passes that stay apart: each term reaches what it trains and nothing else, from one forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from safeloop.plan.nodes import Backward


@dataclass(frozen=True, slots=True)
class SeparateBackward(Backward):
    """One pass of the engine for each term, confined to the parameters that the term trains."""

    verb: ClassVar[str] = "backward"
    trains: tuple[tuple[str, ...], ...] = ()
    """patterns of what each term trains, as `terms`"""

    @property
    def subject(self) -> str:
        return "; ".join(
            f"{term} -> {', '.join(patterns)}" for term, patterns in zip(self.terms, self.trains, strict=True)
        )

    @property
    def note(self) -> str:
        return f"a pass each, graph kept where a later pass needs it{self.penalties}{self.measuring}"

    @property
    def why(self) -> str:
        return "simultaneous: one forward serves all terms, and no update lies between their backward passes"
