"""An update that computes the loss several times: LBFGS. The loop owns its closure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from safeloop.plan.node import Fact, Node, facts


@dataclass(frozen=True, slots=True)
class ClosureUpdate(Node):
    """One step of an optimizer that evaluates loss and gradient as often as it likes, on one and the same window."""

    verb: ClassVar[str] = "update"
    owner: str
    optimizer: str
    inner: tuple[Node, ...]
    """what each evaluation does, in order"""
    max_evaluations: int

    @property
    def gives(self) -> frozenset[Fact]:
        return facts("updated", self.owner)

    @property
    def subject(self) -> str:
        return f"{self.owner}  {self.optimizer}"

    @property
    def note(self) -> str:
        verbs = ", ".join(node.verb for node in self.inner)
        return f"up to {self.max_evaluations} evaluations, each: {verbs}"

    @property
    def why(self) -> str:
        return "the search along a direction needs loss and gradient at several points, each from zeroed gradients"
