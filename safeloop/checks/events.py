"""What happened to the gradients of a loop, as a sequence of events: what the checks of a foreign loop look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from safeloop.autograd.sites import Site


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, and the user's line that made it happen."""

    site: Site | None
    iteration: int


@dataclass(frozen=True, slots=True, eq=False)
class Backward(Event):
    """A backward pass, about to run."""

    number: int
    """counted over the whole watch"""
    reached: frozenset[str]
    """parameters that it adds gradients to"""
    is_complete: bool
    """False where a re-entrant checkpoint hides what else is reached"""
    reaches_inputs: bool
    """whether somebody may want more of it than `.grad`: it reaches leaves that are no parameters, or hooks"""
    is_scaled: bool = False
    """whether a gradient scaler multiplied the loss"""
    factor: float | None = None
    """the number that the loss was multiplied by last; NaN for one that nobody knows, None for none"""
    makes_graph: bool = False
    """`create_graph=True`"""
    root: int = -1
    """the sequence number of the node that it begins at"""
    visited: frozenset[int] = frozenset()
    """the sequence numbers of the nodes that it visits"""
    counts: tuple[tuple[Site | None, int], ...] = ()
    """lines that took a mean, and over how many values"""
    used_at: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """parameter -> the lowest and the highest sequence number of the nodes that use it directly"""


@dataclass(frozen=True, slots=True, eq=False)
class Zero(Event):
    """Gradients were set to None or filled with zeros."""

    parameters: frozenset[str]


@dataclass(frozen=True, slots=True, eq=False)
class GradientUse(Event):
    """A line of the user's read or wrote `.grad`."""

    is_write: bool
    parameters: frozenset[str]
    """`""` stands for a tensor that is no parameter"""


@dataclass(frozen=True, slots=True, eq=False)
class Clip(Event):
    """Gradients were clipped by one of torch's functions."""

    function: str
    limit: float
    parameters: frozenset[str]
    are_zero: bool = False
    """whether every gradient was exactly zero"""
    is_empty: bool = False
    """whether there was no gradient at all; without parameters and unknown ones: whether it was given none"""
    unknown: int = 0
    """parameters that nobody has named"""
    coefficient: Tensor | None = None
    """what every gradient was multiplied by, where that is one number"""


@dataclass(frozen=True, slots=True, eq=False)
class Unscale(Event):
    """A gradient scaler divided the gradients of an owner."""

    owner: str


@dataclass(frozen=True, slots=True, eq=False)
class ScaleUpdate(Event):
    """A gradient scaler adapted its scale."""


@dataclass(frozen=True, slots=True, eq=False)
class Schedule(Event):
    """A learning-rate schedule was moved."""

    owner: str
    """empty where its optimizer is none of those that are watched"""
    scheduler: Any
    was_updated: bool
    """whether its optimizer has ever been stepped"""


@dataclass(frozen=True, slots=True, eq=False)
class Update(Event):
    """An optimizer is about to step, or was kept from it by a gradient scaler."""

    owner: str
    absent: frozenset[str]
    """parameters without a gradient"""
    zero: frozenset[str]
    """parameters whose gradient is exactly zero"""
    rates: tuple[float, ...]
    """the learning rates of its groups"""
    is_scaled_step: bool
    """whether a gradient scaler steps it"""
    has_closure: bool
    is_deep: bool
    """whether backward passes and zeroing were recorded since the step before"""
    frozen: frozenset[str] = frozenset()
    """parameters that do not require grad now"""
    frozen_with_gradient: frozenset[str] = frozenset()
    """those of them that hold a gradient, which is then in `zero` if it is zero"""
    bad: tuple[str, ...] = ()
    """parameters with a gradient that is not finite; filled where the scaler skipped the step"""
    was_skipped: bool = False
    scale: float | None = None
    """the factor of the gradient scaler that skipped it"""
    is_bad: bool = False
    """whether one small gradient, of those that may be read, holds NaN or infinity"""


@dataclass(frozen=True, slots=True, eq=False)
class Iteration(Event):
    """One iteration of the loop is over."""


@dataclass(slots=True)
class Held:
    """What `.grad` of one parameter holds."""

    passes: list[Backward] = field(default_factory=list)
    """the backward passes since it was zeroed"""
    used: int = 0
    """how many of them a step of its owner has used already"""
    is_manual: bool = False
    """whether the user has written into it"""


@dataclass(frozen=True, slots=True, eq=False)
class Stranger:
    """A leaf that a backward pass fills: no parameter that the watch began with, and in no watched optimizer."""

    tensor: Tensor
    site: Site | None
    """the user's line that used it first"""
    last_use: int
    """the highest sequence number of the nodes that use it directly"""


@dataclass(slots=True)
class LoopState:
    """What holds in a loop that is watched, kept up to date by the journal before a check sees an event."""

    owner_of: dict[str, str] = field(default_factory=dict)
    owners: dict[str, frozenset[str]] = field(default_factory=dict)
    """owner -> its trainable parameters"""
    held: dict[str, Held] = field(default_factory=dict)
    updates: Counter[str] = field(default_factory=Counter)
    """owner -> how often it was stepped"""
    last_update: dict[str, Update] = field(default_factory=dict)
    order: list[Event] = field(default_factory=list)
    """the events since the last iteration began, oldest first"""
    recent: list[Event] = field(default_factory=list)
    """the last events, across iterations"""
    is_known: bool = False
    """whether the watch has seen everything since gradients were zeroed"""
    early_zeroing: set[Site | None] = field(default_factory=set)
    """lines that zeroed gradients, or would have, before the first backward pass"""
    unscaled: set[str] = field(default_factory=set)
    """owners whose gradients are divided by the scale already"""
    inside: str = ""
    """the owner whose step is running"""
    optimizers: Mapping[str, Any] = field(default_factory=dict)
    name_of: Mapping[int, str] = field(default_factory=dict)
    """id of a parameter -> its name"""
    stray_step: Site | None = None
    """the line that stepped an optimizer last which is not watched, in the first iterations"""
    strangers: list[Stranger] = field(default_factory=list)
    """of the backward pass that is being told, no longer: they may be large"""
