"""The nodes of a step by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from safeloop.plan.node import NOTHING, Fact, Node, Term, facts


@dataclass(frozen=True, slots=True)
class CustomStep(Node):
    """A method of the user's that performs operations."""

    verb: ClassVar[str] = "custom_step"
    owners: tuple[str, ...]
    is_recorded: bool = False

    @property
    def gives(self) -> frozenset[Fact]:
        return facts("updated", *self.owners)

    @property
    def subject(self) -> str:
        return ", ".join(self.owners)

    @property
    def note(self) -> str:
        return (
            "recorded on the first micro-batch, may change with the batch:" if self.is_recorded else "not recorded yet"
        )

    @property
    def why(self) -> str:
        return "each operation is checked when it is called: needs, gives and voids are those of a plan's nodes"


@dataclass(frozen=True, slots=True)
class CustomBackward(Node):
    """Terms of a custom step in one pass of the engine."""

    verb: ClassVar[str] = "backward"
    terms: tuple[Term, ...]
    owners: tuple[str, ...]
    """owners whose parameters the terms reach"""
    retains_graph: bool = False
    accumulates: bool = False

    @property
    def needs(self) -> frozenset[Fact]:
        return NOTHING if self.accumulates else facts("clean", *self.owners)

    @property
    def gives(self) -> frozenset[Fact]:
        return facts("gradients", *self.owners)

    @property
    def voids(self) -> frozenset[Fact]:
        return frozenset().union(*(facts(kind, *self.owners) for kind in ("clean", "unscaled", "finite", "clipped")))

    @property
    def subject(self) -> str:
        return f"{' + '.join(map(str, self.terms))} -> {', '.join(self.owners)}"

    @property
    def note(self) -> str:
        kept = "graph kept" if self.retains_graph else "graph freed"
        return f"{kept}, added to what is there" if self.accumulates else kept

    @property
    def why(self) -> str:
        return "gradients add up until they are zeroed: what is left of another pass would be mixed in"
