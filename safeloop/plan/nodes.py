"""The operations that a step is made of, in the order in which they run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from safeloop.plan.node import NOTHING, Fact, Node, Term, facts


def _of_gradients(owners: tuple[str, ...]) -> frozenset[Fact]:
    kinds = ("gradients", "unscaled", "finite", "clipped")
    return frozenset().union(*(facts(kind, *owners) for kind in kinds))


@dataclass(frozen=True, slots=True)
class Zero(Node):
    """Forget the gradients of earlier steps."""

    verb: ClassVar[str] = "zero"
    owners: tuple[str, ...]

    @property
    def gives(self) -> frozenset[Fact]:
        return facts("clean", *self.owners)

    @property
    def voids(self) -> frozenset[Fact]:
        return _of_gradients(self.owners)

    @property
    def subject(self) -> str:
        return ", ".join(self.owners)

    @property
    def note(self) -> str:
        return "set to none"

    @property
    def why(self) -> str:
        return "gradients add up until they are forgotten; none, not zeros: no optimizer moves what took no part"


@dataclass(frozen=True, slots=True)
class Forward(Node):
    """Call the user's loss function on a micro-batch."""

    verb: ClassVar[str] = "forward"
    phase: str
    terms: tuple[Term, ...]
    is_open: bool = False
    """whether the function may return terms that the config does not declare"""

    @property
    def gives(self) -> frozenset[Fact]:
        return facts("graph", self.phase)

    @property
    def subject(self) -> str:
        return ", ".join([*(term.name for term in self.terms), *(["..."] if self.is_open else [])])

    @property
    def note(self) -> str:
        penalties = [f"{term.name} = {term.formula}" for term in self.terms if term.formula]
        return "; ".join([*penalties, *(["and what else losses() returns, with weight 1"] if self.is_open else [])])

    @property
    def why(self) -> str:
        return "each term is checked before the backward pass: a scalar with a path to what it trains"


@dataclass(frozen=True, slots=True)
class Backward(Node):
    """All terms in one pass of the engine."""

    verb: ClassVar[str] = "backward"
    phase: str
    terms: tuple[Term, ...]
    owners: tuple[str, ...]
    is_open: bool = False
    exact_every: int | None = None
    """steps between two exact measurements of each term's gradient norm"""

    @property
    def needs(self) -> frozenset[Fact]:
        return facts("graph", self.phase) | facts("clean", *self.owners)

    @property
    def gives(self) -> frozenset[Fact]:
        return facts("gradients", *self.owners)

    @property
    def voids(self) -> frozenset[Fact]:
        return facts("graph", self.phase) | facts("clean", *self.owners)

    @property
    def subject(self) -> str:
        terms = " + ".join([*(str(term) for term in self.terms), *(["..."] if self.is_open else [])])
        return f"{terms} -> {', '.join(self.owners)}"

    @property
    def note(self) -> str:
        return f"one pass, graph freed{self.penalties}{self.measuring}"

    @property
    def penalties(self) -> str:
        """Which terms are made of gradients, as part of a note."""
        return "".join(f"; {term.note}" for term in self.terms if term.note)

    @property
    def measuring(self) -> str:
        """What the exact measurement of each term's norm costs, as the end of a note."""
        if self.exact_every is None:
            return ""
        when = "on every step" if self.exact_every == 1 else f"every {self.exact_every} steps"
        return f"; {when} one pass more for each term, to measure its norm"

    @property
    def why(self) -> str:
        if len(self.terms) == 1 and not self.is_open:
            return "one term: one pass, retain_graph=False"
        return (
            "no update lies between the terms, so one pass serves all: nothing to retain, shared layers are walked once"
        )


@dataclass(frozen=True, slots=True)
class Unscale(Node):
    """Divide the gradients by the scale that the backward pass was multiplied by."""

    verb: ClassVar[str] = "unscale"
    owners: tuple[str, ...]

    @property
    def needs(self) -> frozenset[Fact]:
        return facts("gradients", *self.owners)

    @property
    def gives(self) -> frozenset[Fact]:
        return facts("unscaled", *self.owners)

    @property
    def subject(self) -> str:
        return ", ".join(self.owners)

    @property
    def note(self) -> str:
        return "by the scale of the backward pass"

    @property
    def why(self) -> str:
        return "before the finite check, the clipping and every reading: they mean the true gradients"


@dataclass(frozen=True, slots=True)
class Finite(Node):
    """Refuse NaN and infinity before anything is changed by them."""

    verb: ClassVar[str] = "finite"
    owners: tuple[str, ...]
    policy: str = "raise"
    is_deferred: bool = False
    is_scaled: bool = False
    """whether the backward pass was multiplied by a gradient scale"""
    waits: bool = False
    """whether the host must wait for the device to know"""

    @property
    def needs(self) -> frozenset[Fact]:
        unscaled = facts("unscaled", *self.owners) if self.is_scaled else NOTHING
        return facts("gradients", *self.owners) | unscaled

    @property
    def gives(self) -> frozenset[Fact]:
        return facts("finite", *self.owners)

    @property
    def subject(self) -> str:
        return ", ".join(self.owners)

    @property
    def note(self) -> str:
        later, now = ", read one step later" * self.is_deferred, ", one sync: looked at before the update" * self.waits
        return f"policy {self.policy}{later}{now}"

    @property
    def why(self) -> str:
        if self.is_deferred:
            return (
                "a flag on the device blocks this update and all later ones; it is read one step later, without a sync"
            )
        why = "checked through the gradient norm, which the log needs anyway; all owners are refused together or none"
        if self.waits:
            return (
                f"{why}; without a sync only where policy is raise, no weights are averaged, and all kernels are fused"
            )
        return why


@dataclass(frozen=True, slots=True)
class Clip(Node):
    """Limit the gradients of one owner."""

    verb: ClassVar[str] = "clip"
    owner: str
    limit: float
    kind: str = "max_norm"
    """`max_norm`, `clip_value` or `agc`: the key of the config"""

    @property
    def needs(self) -> frozenset[Fact]:
        return facts("gradients", self.owner) | facts("finite", self.owner)

    @property
    def gives(self) -> frozenset[Fact]:
        return facts("clipped", self.owner)

    @property
    def subject(self) -> str:
        return f"{self.owner}  {_LIMITS[self.kind].format(self.limit)}"

    @property
    def note(self) -> str:
        return "after the finite check: a NaN is never spread"

    @property
    def why(self) -> str:
        return _WHY_CLIP[self.kind]


_LIMITS = {
    "max_norm": "norm <= {:g}",
    "clip_value": "each value <= {:g}",
    "agc": "each unit <= {:g} of its weights",
}
_WHY_CLIP = {
    "max_norm": "clipping multiplies every gradient by max_norm / norm: one NaN in the norm would reach all of them",
    "clip_value": "clamping would make an infinite gradient look like a large one",
    "agc": "clipping multiplies a unit's gradient by what its norm allows: one NaN would reach the whole unit",
}


@dataclass(frozen=True, slots=True)
class Update(Node):
    """One step of an optimizer."""

    verb: ClassVar[str] = "update"
    owner: str
    optimizer: str
    is_clipped: bool = False
    note_text: str = ""
    phases: tuple[str, ...] = ()
    """phases whose graph may hold the old weights"""

    @property
    def needs(self) -> frozenset[Fact]:
        clipped = facts("clipped", self.owner) if self.is_clipped else NOTHING
        return facts("gradients", self.owner) | facts("finite", self.owner) | clipped

    @property
    def gives(self) -> frozenset[Fact]:
        return facts("updated", self.owner)

    @property
    def voids(self) -> frozenset[Fact]:
        return _of_gradients((self.owner,)) | facts("graph", *self.phases)

    @property
    def subject(self) -> str:
        return f"{self.owner}  {self.optimizer}"

    @property
    def note(self) -> str:
        return self.note_text

    @property
    def why(self) -> str:
        return "only gradients that are of this step, complete, finite and clipped reach the weights"


@dataclass(frozen=True, slots=True)
class Schedule(Node):
    """Advance one learning-rate schedule."""

    verb: ClassVar[str] = "schedule"
    owner: str
    scheduler: str
    per: str = "step"
    """`step` or `epoch`"""

    @property
    def needs(self) -> frozenset[Fact]:
        return facts("updated", self.owner)

    @property
    def subject(self) -> str:
        return f"{self.owner}  {self.scheduler}"

    @property
    def note(self) -> str:
        return "once a step" if self.per == "step" else "after the last step of each epoch"

    @property
    def why(self) -> str:
        return "after the update, or the first learning rate would be skipped; not at all when the update was skipped"


@dataclass(frozen=True, slots=True)
class Adapt(Node):
    """Adapt the gradient scale."""

    verb: ClassVar[str] = "adapt"
    owners: tuple[str, ...]

    @property
    def needs(self) -> frozenset[Fact]:
        return facts("updated", *self.owners)

    @property
    def subject(self) -> str:
        return "gradient scale"

    @property
    def note(self) -> str:
        return "once a step, after all updates"

    @property
    def why(self) -> str:
        return "a scale that changed between a backward pass and its unscale would falsify the gradients"
