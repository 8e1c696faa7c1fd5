"""What leaves a step, and what travels through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from safeloop.step.randomness import NOTHING_KEPT, RandomState
from safeloop.step.turn import Rerun, Turn

if TYPE_CHECKING:
    from safeloop.faults import Fault

Reading = Tensor | float
"""A number that was measured: a 0-d tensor still on its device, or a float where the step had to look at it anyway."""


@dataclass(frozen=True, slots=True)
class TermGeometry:
    """How the gradients of a phase's terms stand to one another at their shared cut, weights included."""

    names: tuple[str, ...]
    norms: Tensor
    """`[number of terms]`"""
    cosines: Tensor
    """`[number of terms, number of terms]`"""
    pairs: tuple[tuple[int, int], ...]
    """the terms, i < j, whose cosine says something"""


@dataclass(frozen=True, slots=True)
class Watched:
    """What was measured at one watched tensor."""

    turn: object
    """of which turn: its gradients belong together"""
    square: Tensor
    """the squared norm of the gradient, 0-d"""


@dataclass(slots=True)
class StepReport:
    """What one step measured. Tensors are detached and still on the device; of a repeated phase, the last turn's."""

    step: int
    """how many steps were finished before this one"""
    terms: dict[str, Tensor] = field(default_factory=dict)
    """loss term -> its value before weighting, 0-d; under accumulation, of the whole window"""
    norms: dict[str, Reading] = field(default_factory=dict)
    """owner -> norm of its gradients before clipping"""
    num_gradients: dict[str, int] = field(default_factory=dict)
    """owner -> how many of its parameters have a gradient"""
    each_norm: dict[str, Tensor] = field(default_factory=dict)
    """owner -> norm of each of its gradients, `[number of parameters with a gradient]`"""
    present: dict[str, list[str]] = field(default_factory=dict)
    """owner -> names of the parameters that have a gradient; filled on the steps that log modules"""
    geometry: list[TermGeometry] = field(default_factory=list)
    """of each phase with several terms; filled on the steps that log, from the last micro-batch"""
    exact_norms: dict[str, Tensor] = field(default_factory=dict)
    """loss term -> norm of its gradient over all parameters that it trains, 0-d; filled on the steps that measure it"""
    clipped: dict[str, Reading] = field(default_factory=dict)
    """owner -> whether clipping changed its gradients: 1 or 0"""
    clipped_norms: dict[str, Reading] = field(default_factory=dict)
    """owner -> norm of its gradients after clipping; filled on the steps that log"""
    watched: dict[str, Watched] = field(default_factory=dict)
    """name -> the gradient at a watched tensor; filled on the steps that log"""
    balanced: dict[str, float] = field(default_factory=dict)
    """loss term -> its new weight; filled on the steps that balance"""
    inactive: dict[str, float] = field(default_factory=dict)
    """term declared `may_be_constant` -> the part of the step on which it was missing, or reached no parameter"""
    updated: set[str] = field(default_factory=set)
    """owners that were updated at least once"""
    num_skipped: int = 0
    """turns of phases that a non-finite gradient kept from their update"""


@dataclass(slots=True)
class Frame:
    """The scratch of one turn of a phase: what a node leaves for the next."""

    report: StepReport
    batch: Any = None
    phase: str = ""
    window: Sequence[Any] = ()
    """all micro-batches of the turn"""
    rerun: Rerun | None = None
    """how to run the turn again; None where it cannot be"""
    random: RandomState = NOTHING_KEPT
    """what was kept of the random state at its start"""
    faults: Sequence[Fault] = ()
    """what the finite check found; told where the update is left out"""
    source: str = ""
    """where the loss function is defined"""
    share: float | None = None
    """the part of the window that this micro-batch is; None without accumulation"""
    turn_key: object = field(default_factory=object)
    """the same for all micro-batches of a turn, and for no others"""
    is_audited: bool = False
    wants_modules: bool = False
    is_skipped: bool = False
    """whether a non-finite gradient keeps every owner of the phase from its update"""
    roots: list[Tensor] = field(default_factory=list)
    """terms to differentiate"""
    seeds: list[Tensor] = field(default_factory=list)
    """their gradients to begin with: the weights"""
    root_names: list[str] = field(default_factory=list)
    """the names of the roots"""
    terms: dict[str, Tensor] = field(default_factory=dict)
    """loss term -> its value before weighting, so far in this turn"""
    term_gradients: dict[str, list[Tensor | None]] = field(default_factory=dict)
    """loss term -> its gradients so far in this window; only under accumulation, on the steps that measure them"""
    inactive: dict[str, float] = field(default_factory=dict)
    """permitted term -> the part of the window on which it was left out"""
    gradients: dict[str, list[Tensor]] = field(default_factory=dict)
    """owner -> its gradients"""
    totals: dict[str, Tensor] = field(default_factory=dict)
    """owner -> norm of its gradients before clipping, 0-d"""

    @property
    def turn(self) -> Turn | None:
        """What it takes to run the turn again; made when it is asked for, as every turn would pay for it."""
        return None if self.rerun is None else Turn(self.rerun, self.window, self.random)

    def leave_out(self, term: str) -> None:
        """Count a permitted term as left out of the present micro-batch."""
        self.inactive[term] = self.inactive.get(term, 0.0) + (1.0 if self.share is None else self.share)
