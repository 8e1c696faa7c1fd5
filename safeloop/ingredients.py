"""What a user brings to a run, whether from code or from a config: objects and methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from safeloop.data.source import Source

if TYPE_CHECKING:
    from safeloop.config import Loaded
    from safeloop.config.run import RunConfig

Losses = Callable[[Any], Mapping[str, Any]]


@dataclass(frozen=True)
class PhaseMethod:
    """A loss function of the user's, and which owners it trains when."""

    name: str
    losses: Losses
    source: str
    """where it is defined"""
    terms: Sequence[str]
    """loss terms that are known beforehand"""
    is_open: bool
    """whether it may return further terms"""
    trains: Sequence[str] | None = None
    """names of owners; None: all"""
    repeat: int = 1
    every: int = 1


@dataclass(frozen=True)
class Ingredients:
    """What the user brings: objects and methods, whether from code or from a config."""

    loaded: Loaded
    model: nn.Module
    data: Source
    phases: Sequence[PhaseMethod]
    count: Callable[[Any], int]
    """samples in a micro-batch"""
    count_tokens: Callable[[Any], int] | None = None
    """tokens in a micro-batch; None: the user does not say"""
    optimizers: Mapping[str, Optimizer] | None = None
    """ready optimizers; None: the config's are built"""
    custom: Callable[[Any, Any], None] | None = None
    """a `custom_step` in place of phases"""
    holders: Sequence[object] = ()
    """objects of the user's whose attributes the audit may look at: the Trainer"""

    @property
    def config(self) -> RunConfig:
        """The validated config."""
        return self.loaded.config
