"""What every penalty has: a weight, when it is due, what of which function it is, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError
from torch import Tensor

from safeloop.checks.config.run import BadInputPath
from safeloop.component import Component, Float, Int
from safeloop.optim.specs import Patterns
from safeloop.penalties import gradients
from safeloop.weights import WeightRamp


def _path(path: str, roots: tuple[str, ...]) -> str:
    root, *parts = path.split(".")
    is_loss = root == "loss"
    is_known = root in roots and all(part and (is_loss or part.isdecimal() or part.isidentifier()) for part in parts)
    if not is_known or (is_loss and not parts):
        words = " or ".join(f"`{name}.NAME`" if name == "loss" else f"`{name}`" for name in roots)
        message = "{path} leads nowhere; start with {words}"
        raise PydanticCustomError(BadInputPath.code, message, {"path": repr(path), "words": words})
    return path


OfPath = Annotated[str, AfterValidator(lambda path: _path(path, ("loss", "output")))]
"""`loss.NAME`, or `output` and then keys, indices or attributes."""

AtPath = Annotated[str, AfterValidator(lambda path: _path(path, ("batch",)))]
"""`batch`, then keys, indices or attributes."""


class Penalty(Component):
    """A loss term that is made of gradients, which it differentiates again.

    Every penalty is the mean over samples of a number for each sample; norms are over all features of a sample. The
    derivatives are taken with `torch.autograd.grad(create_graph=True)`, and the graph is freed with the step's.
    """

    is_per_sample: ClassVar[bool] = True
    """whether it needs row i of the values to belong to row i of the point"""
    order: ClassVar[int] = 2
    """derivatives that training it takes, with the one of the backward pass"""

    type: str
    weight: Float | WeightRamp = 1.0
    """factor of this term in the sum that is differentiated: a number, or a line from `start` to `end` over `steps`"""
    every: Int = Field(default=1, ge=1)
    """computed only on the steps that this divides, and multiplied by it there, so that its mean over time stays"""
    trains: Patterns | None = None
    """patterns of the parameters that this term may reach; reaching another one, or none, is a fault"""
    of: OfPath | None = None
    """config-only runs: what is differentiated: `loss.NAME`, `output` or `output.KEY`"""
    at: AtPath | None = None
    """config-only runs: with respect to what, a path into the batch: `batch.0`"""

    @property
    def formula(self) -> str:
        """What it is, in a few words for the plan."""
        raise NotImplementedError

    @property
    def first_weight(self) -> float:
        """The weight on the first step, without the factor `every`."""
        return self.weight.at(0) if isinstance(self.weight, WeightRamp) else self.weight

    def value(self, field: gradients.Field) -> Tensor:
        """The penalty, 0-d, float32 or wider, before its weight."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class LazyWeight:
    """The weight of a penalty that is due every k steps: k times what is written, so that its mean over time stays.

    Source: Tero Karras et al.: Analyzing and Improving the Image Quality of StyleGAN (arXiv 1912.04958, 2020), appendix
    B, "lazy regularization".
    """

    penalty: Penalty

    def at(self, step: int) -> float:
        """The weight on a step, counted from 0."""
        weight = self.penalty.weight
        return (weight.at(step) if isinstance(weight, WeightRamp) else weight) * self.penalty.every
