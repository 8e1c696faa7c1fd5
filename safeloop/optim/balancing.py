"""Weights of loss terms that follow the sizes of their gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from safeloop.component import Component, Float, Int


class BalanceSpec(Component):
    """Keep the terms of a phase at the shares of the gradient that their weights say.

    With `n_k` the norm of the unweighted gradient of term k and `c_k` its weight in `losses`, the weight goes to
    `c_k mean_j(n_j) / n_k`, so that the weighted norms stand as the `c_k`. It moves there as a running mean, and stays
    within `1 / limit` and `limit` times `c_k`. A term without gradient, and one whose weight follows a schedule, keeps
    its weight. An update by LBFGS leaves all weights alone: its objective must not move.

    Cost every `every` steps: at `parameters`, one backward pass for each term; at `cut`, that of the taps (a few
    percent of the backward pass); and one sync.

    Source: S. Wang, Y. Teng, P. Perdikaris, "Understanding and Mitigating Gradient Flow Pathologies in Physics-Informed
    Neural Networks", SIAM Journal on Scientific Computing 43 (2021), algorithm 1, with norms in place of the largest
    and the mean entry, as in S. Wang et al., "An Expert's Guide to Training Physics-informed Neural Networks", 2023,
    algorithm 1; and with the mean over terms in place of their sum, so that equal terms keep their weights.
    """

    every: Int = Field(default=100, ge=1)
    """steps between two adjustments"""
    rate: Float = Field(default=0.1, gt=0, le=1)
    """how far each goes: 1 goes all the way"""
    at: Literal["parameters", "cut"] = "parameters"
    """where norms are measured: over all parameters, or at the last features that the terms share"""
    limit: Float = Field(default=1000.0, gt=1)
    """the largest factor between a weight and the one in `losses`"""

    def adjusted(
        self, weights: Mapping[str, float], wanted: Mapping[str, float], norms: Mapping[str, float]
    ) -> dict[str, float]:
        """The new weights of the terms that have a norm.

        Args:
            weights: term -> its present weight.
            wanted: term -> its share, as the config says it.
            norms: term -> the norm of its gradient with its present weight.
        """
        sizes = {n: norm / abs(weights[n]) for n, norm in norms.items() if weights[n] and norm and math.isfinite(norm)}
        if not sizes:
            return {}
        mean = sum(sizes.values()) / len(sizes)
        factors = {n: min(max(mean / size, 1 / self.limit), self.limit) for n, size in sizes.items()}
        return {n: (1 - self.rate) * weights[n] + self.rate * wanted[n] * factor for n, factor in factors.items()}
