"""The node that averages weights over steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from safeloop.plan.node import Node


@dataclass(frozen=True, slots=True)
class Average(Node):
    """Average the weights into a copy of the model."""

    verb: ClassVar[str] = "average"
    rule: str

    @property
    def subject(self) -> str:
        return self.rule

    @property
    def note(self) -> str:
        return "a copy of the model: evaluated and saved beside the live weights"

    @property
    def why(self) -> str:
        return "after all updates; not at all when every update was skipped, nor with weights that are not finite"
