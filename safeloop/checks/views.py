"""What checks look at: plain data, filled by a plan's nodes or by hooks in a foreign loop; never the Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from safeloop.checks.source import Place


@dataclass(frozen=True)
class Ownership:
    """Who updates which parameter, by full names; a tied parameter has one name, the others are aliases."""

    owner_of: Mapping[str, str]
    """parameter name -> owner (optimizer) name, for every parameter that some optimizer updates"""
    frozen: tuple[str, ...] = ()
    """declared `frozen:`, or `requires_grad=False` from the start"""
    unowned: tuple[str, ...] = ()
    """trainable, but in no optimizer"""
    duplicated: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """parameter name -> the several owners that claim it"""
    tied: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """parameter name -> its aliases (the same tensor under other names)"""
    foreign: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """owner name -> tensors that it holds but that are no parameter of the model"""
    empty: tuple[str, ...] = ()
    """owners that hold nothing"""
    unmatched: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """config path (`optimizers.main.params`) -> its patterns that match no parameter"""


@dataclass(frozen=True)
class SetupView:
    """The model and its owners, once, before the first step."""

    model: nn.Module
    ownership: Ownership
    optimizers: Mapping[str, Optimizer] = field(default_factory=dict)
    """owner name -> the optimizer, where there is one already"""


@dataclass(frozen=True)
class TermsView:
    """What the user's loss function returned, before the backward pass."""

    terms: Mapping[str, Any]
    """term name -> whatever was returned under it: a tensor, `(tensor, weights)`, or something wrong"""
    weights: Mapping[str, float]
    """term name -> weight, for the terms that the config declares"""
    declared: Sequence[str]
    """terms that the config declares"""
    constants_allowed: frozenset[str]
    """terms declared `may_be_constant: true`"""
    parameters: Mapping[str, nn.Parameter]
    """the model's parameters by name"""
    owned: frozenset[str]
    """names of the parameters that some optimizer updates"""
    trains: Mapping[str, Sequence[str]]
    """term name -> patterns over parameter names, for terms that declare what they train"""
    source: str
    """where the loss function is defined: `examples/digits.py:41 in Digits.losses`"""
    made: Mapping[str, Place] = field(default_factory=dict)
    """term name -> the line that made it, on the steps that are looked at in depth"""
    cuts: Mapping[str, str] = field(default_factory=dict)
    """term name -> where its gradient path was cut, and by what"""
    penalties: frozenset[str] = frozenset()
    """terms whose section stands under `penalties:`"""

    def section(self, term: str) -> str:
        """The path of a term's section in the config."""
        return f"{'penalties' if term in self.penalties else 'losses'}.{term}"


@dataclass(frozen=True)
class GradientsView:
    """The gradients of one update, before clipping."""

    parameters: Mapping[str, nn.Parameter]
    """name -> parameter, of the owners being updated; read `.grad`"""
    terms: Mapping[str, Tensor]
    """term name -> its value, 0-d"""
    step: int
    where: str
