"""The node that sets the weights of loss terms by the sizes of their gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from safeloop.plan.node import Node


@dataclass(frozen=True, slots=True)
class Balance(Node):
    """Move the weights of a phase's terms towards their shares of the gradient."""

    verb: ClassVar[str] = "balance"
    phase: str
    every: int
    at: str

    @property
    def subject(self) -> str:
        return "loss weights"

    @property
    def note(self) -> str:
        cost = "one pass more for each term" if self.at == "parameters" else "by the taps"
        return f"every {self.every} steps, by norms at the {self.at}: {cost}"

    @property
    def why(self) -> str:
        return "after the updates: the gradients of one step have one and the same weights throughout"
