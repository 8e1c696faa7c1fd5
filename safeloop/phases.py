"""`@phase`: a loss function of its own, the optimizers that it trains, and when it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

_MARK = "__safeloop_phase__"
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class PhaseMark:
    """What `@phase` says of a method."""

    trains: tuple[str, ...]
    repeat: int = 1
    every: int = 1


def phase(trains: str | Sequence[str], *, repeat: int = 1, every: int = 1) -> Callable[[Function], Function]:
    """Mark a method of a Trainer as a phase: it gets a micro-batch and returns its loss terms by name.

    Phases run in the order in which they are defined. While one runs, the parameters that it does not train are
    frozen, so that gradients pass through them and none stay in them.

    Args:
        trains: names of the optimizers that the phase updates.
        repeat: so many turns in a step, each with fresh micro-batches.
        every: only on the steps that this divides.
    """
    if repeat < 1 or every < 1:
        raise ValueError(f"repeat and every are at least 1, not {repeat} and {every}")
    mark = PhaseMark((trains,) if isinstance(trains, str) else tuple(trains), repeat, every)

    def marked(function: Function) -> Function:
        setattr(function, _MARK, mark)
        return function

    return marked


def phases_of(cls: type[Any]) -> dict[str, PhaseMark]:
    """The phases of a class in the order of their definition, those of its bases first; an override stays a phase."""
    names = dict.fromkeys(name for base in reversed(cls.__mro__) for name, f in vars(base).items() if hasattr(f, _MARK))
    return {name: next(getattr(f, _MARK) for f in _versions(cls, name) if hasattr(f, _MARK)) for name in names}


def _versions(cls: type[Any], name: str) -> list[Any]:
    """A method of a class and what it overrides, nearest first."""
    return [vars(base)[name] for base in cls.__mro__ if name in vars(base)]
