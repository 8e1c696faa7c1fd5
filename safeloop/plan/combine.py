"""The backward pass of a phase whose loss terms may pull in opposite directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from safeloop.plan.nodes import Backward


@dataclass(frozen=True, slots=True)
class CombinedBackward(Backward):
    """The terms' gradients, combined by a rule that knows of conflicts."""

    verb: ClassVar[str] = "backward"
    rule: str = ""
    at: str = "parameters"
    """where the gradients are combined: `parameters` or `cut`"""

    @property
    def note(self) -> str:
        if self.at == "cut":
            return (
                f"{self.rule} of the terms' gradients at the features that they share{self.penalties}{self.measuring}"
            )
        return f"a pass for each term, {self.rule} of their gradients{self.penalties}"

    @property
    def why(self) -> str:
        if self.at == "cut":
            return (
                "combine, at: cut: where terms oppose each other, what flows into the shared layers is not their sum; "
                "one pass where the cut is one node, else what lies above it runs twice"
            )
        return (
            "combine, at: parameters: where terms oppose each other, the update is not along their sum; their scalar "
            "products need each term's gradient by itself"
        )
