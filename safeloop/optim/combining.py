"""Rules that combine the gradients of conflicting loss terms, by torchjd (the extra `multitask`)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from safeloop.component import Component, Float
from safeloop.signatures import union

MULTITASK = 'pip install "safeloop[multitask]"'
CAGRAD = 'pip install "safeloop[multitask,cagrad]"'


class CombineSpec(Component):
    """How the gradients of a phase's loss terms, weights included, become one.

    Every rule is linear: the result is `sum_k c_k g_k`, with factors `c` from the scalar products `<g_i, g_j>` alone.
    """

    packages: ClassVar[tuple[str, ...]] = ("torchjd",)
    """what must be installed"""
    install: ClassVar[str] = MULTITASK
    type: str
    at: Literal["parameters", "cut"] = "parameters"
    """parameters: gradients of everything that the phase trains, one backward pass for each term; the log then has
    their exact norms instead of those at the cut. cut: gradients of the features that the terms share, at the price of
    about one pass; parameters above keep their plain gradient"""

    def __str__(self) -> str:
        return self.type

    def factors(self, gram: Tensor) -> Tensor:
        """The factor of each term, `[K]`, from the scalar products of the terms' gradients, `[K, K]`."""
        factors: Tensor = self.weighting(import_module("torchjd.aggregation"))(gram)
        return factors

    def weighting(self, torchjd: Any) -> Any:
        """The rule of torchjd."""
        raise NotImplementedError


class UpgradSpec(CombineSpec):
    """Mean of the gradients, each projected so that it opposes no term: no term gets worse to first order.

    Equal gradients give their mean: with K terms, a step is K times shorter than that of the sum.

    Source: Pierre Quinton and Valerian Rey: Jacobian Descent for Multi-Objective Optimization (arXiv 2406.16232, 2024).
    """

    packages: ClassVar[tuple[str, ...]] = ("torchjd", "qpsolvers", "quadprog")
    type: Literal["upgrad"] = "upgrad"

    def weighting(self, torchjd: Any) -> Any:
        return torchjd.UPGradWeighting()


class PcgradSpec(CombineSpec):
    """Sum of the gradients, from each of which what opposes another is taken off, one after the other.

    Equal gradients give their sum. With three terms or more the result depends on the order, which is drawn from the
    run's seed and the step.

    Source: Tianhe Yu et al.: Gradient Surgery for Multi-Task Learning (arXiv 2001.06782, 2020), algorithm 1.
    """

    type: Literal["pcgrad"] = "pcgrad"

    def weighting(self, torchjd: Any) -> Any:
        return torchjd.PCGradWeighting()


class MgdaSpec(CombineSpec):
    """The shortest convex combination of the gradients: zero where no step serves all terms.

    Equal gradients give their mean. The smallest gradient leads: a term that has converged stops the others.

    Source: Ozan Sener and Vladlen Koltun: Multi-Task Learning as Multi-Objective Optimization (arXiv 1810.04650, 2018).
    """

    type: Literal["mgda"] = "mgda"

    def weighting(self, torchjd: Any) -> Any:
        return torchjd.MGDAWeighting()


class CagradSpec(CombineSpec):
    """The mean gradient, moved within a ball around it towards the term that gains least.

    Equal gradients give their mean times `1 + c`. Needs a solver besides torchjd: the extra `cagrad`.

    Source: Bo Liu et al.: Conflict-Averse Gradient Descent for Multi-task Learning (arXiv 2110.14048, 2021).
    """

    packages: ClassVar[tuple[str, ...]] = ("torchjd", "cvxpy", "clarabel")
    install: ClassVar[str] = CAGRAD
    type: Literal["cagrad"] = "cagrad"
    c: Float = Field(default=0.5, ge=0, lt=1)
    """radius of the ball over the norm of the mean gradient; 0 is the mean itself"""

    def weighting(self, torchjd: Any) -> Any:
        return torchjd.CAGradWeighting(c=self.c)


COMBINE: dict[str, type[CombineSpec]] = {
    "upgrad": UpgradSpec,
    "pcgrad": PcgradSpec,
    "mgda": MgdaSpec,
    "cagrad": CagradSpec,
}

if TYPE_CHECKING:
    AnyCombine = CombineSpec
else:
    AnyCombine = union(COMBINE)
