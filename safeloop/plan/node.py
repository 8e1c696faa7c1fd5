"""What every operation of a step is: it declares what it needs, gives and voids; `plan.py` walks these facts.

A fact is a `Fact(kind, subject)`: the subject is an owner, or a phase for `graph`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple


class Fact(NamedTuple):
    """Something that holds at a point of the step."""

    kind: str
    subject: str

    def __str__(self) -> str:
        return _SENTENCES[self.kind].format(self.subject)


_SENTENCES = {
    "unscaled": "the gradients of `{}` are divided by the gradient scale",
    "clean": "the gradients of `{}` are zeroed",
    "graph": "phase `{}` has run its forward, and no update has changed the weights that its graph saved",
    "gradients": "`{}` has the gradients of this step",
    "finite": "the gradients of `{}` are checked to be finite",
    "clipped": "the gradients of `{}` are clipped",
    "updated": "`{}` is updated",
}


class Term(NamedTuple):
    """A loss term as the plan knows it."""

    name: str
    weight: float = 1.0
    order: int = 1
    """derivatives that training it takes: 2 for a penalty, which is made of gradients"""
    every: int = 1
    """a penalty: computed on the steps that this divides, and multiplied by it"""
    formula: str = ""
    """a penalty: what it is"""

    @property
    def note(self) -> str:
        """What a reader should know of a penalty; empty for a plain term."""
        if self.order == 1:
            return ""
        lazy = f" every {self.every} steps, times {self.every}" if self.every > 1 else ""
        return f"{self.name} is {_ORDERS[self.order]} order{lazy}"

    def __str__(self) -> str:
        return self.name if self.weight == 1.0 else f"{self.weight:g} {self.name}"


_ORDERS = {2: "second", 3: "third"}


def facts(kind: str, *subjects: str) -> frozenset[Fact]:
    """One fact of `kind` for each subject."""
    return frozenset(Fact(kind, subject) for subject in subjects)


NOTHING: frozenset[Fact] = frozenset()


@dataclass(frozen=True, slots=True)
class Node:
    """One operation of a phase."""

    verb: ClassVar[str]

    @property
    def needs(self) -> frozenset[Fact]:
        """What must hold before."""
        return NOTHING

    @property
    def gives(self) -> frozenset[Fact]:
        """What holds afterwards."""
        return NOTHING

    @property
    def voids(self) -> frozenset[Fact]:
        """What no longer holds afterwards."""
        return NOTHING

    @property
    def subject(self) -> str:
        """What it works on, for the printed plan."""
        return ""

    @property
    def note(self) -> str:
        """What a reader of the plan should know, in a few words."""
        return ""

    @property
    def why(self) -> str:
        """Why it stands where it stands."""
        return ""
