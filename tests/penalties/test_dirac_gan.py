"""The Dirac-GAN of Mescheder et al. (2018): it circles without regularisation and converges with R1.

One real sample at 0, one generated sample at theta, a linear discriminator D(x) = psi x. With
`f(t) = -log(1 + exp(-t))` the discriminator maximises what the generator minimises, `L = f(theta psi) + f(0)`, so that
the gradient field is `(-f'(theta psi) psi, f'(theta psi) theta)`: at right angles to (theta, psi), whose length it
keeps.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import safeloop as sl

LR, STEPS = 0.05, 300
OWNERS = {
    "discriminator": {"type": "SGD", "lr": LR, "params": ["psi"]},
    "generator": {"type": "SGD", "lr": LR, "params": ["theta"]},
}


class Dirac(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        self.psi = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def score(self, x: Tensor) -> Tensor:
        return self.psi * x


class Alternating(sl.Trainer):
    """The discriminator moves, then the generator."""

    kind = "none"

    @sl.phase(trains="discriminator")
    def discriminate(self, zero: Tensor) -> dict[str, Any]:
        fake = self.model.theta.view(1)
        terms: dict[str, Any] = {"loss": F.softplus(-self.model.score(fake)).mean()}
        if self.kind != "none":
            terms[self.kind] = self.penalty(self.model.score, at=zero if self.kind == "r1" else fake)
        return terms

    @sl.phase(trains="generator")
    def generate(self, zero: Tensor) -> dict[str, Any]:
        return {"adversarial": -F.softplus(-self.model.score(self.model.theta.view(1))).mean()}


def train(kind: str, gamma: float) -> list[tuple[float, float]]:
    path: list[tuple[float, float]] = []

    class Run(Alternating):
        @sl.phase(trains="discriminator")
        def discriminate(self, zero: Tensor) -> dict[str, Any]:
            path.append((self.model.theta.item(), self.model.psi.item()))
            return super().discriminate(zero)

    run = Run(
        model=Dirac(),
        data=[torch.zeros(1, dtype=torch.float64)],
        optimizers=OWNERS,
        penalties={} if kind == "none" else {kind: {"type": kind, "weight": gamma}},
        run={"max_steps": STEPS},
        log={"sinks": []},
    )
    run.kind = kind
    assert run.fit().faults == ()
    return [*path, (run.model.theta.item(), run.model.psi.item())]


def slope(t: float) -> float:
    """`f'(t)`."""
    return 1 / (1 + math.exp(t))


def analytic(gamma: float) -> list[tuple[float, float]]:
    """The alternating update by hand; R1 and R2 of a linear discriminator are both gamma psi^2 / 2."""
    theta, psi = 1.0, 0.5
    path = [(theta, psi)]
    for _ in range(STEPS):
        psi += LR * (slope(theta * psi) * theta - gamma * psi)
        theta -= LR * slope(theta * psi) * psi
        path.append((theta, psi))
    return path


@pytest.mark.parametrize(("kind", "gamma"), [("none", 0.0), ("r1", 1.0), ("r2", 1.0), ("r1", 0.3)])
def test_the_trajectory_is_that_of_the_analytic_update(kind: str, gamma: float) -> None:
    for found, wanted in zip(train(kind, gamma), analytic(gamma), strict=True):
        assert found == pytest.approx(wanted, rel=1e-6, abs=1e-9)


def radii(path: list[tuple[float, float]]) -> list[float]:
    return [math.hypot(*point) for point in path]


def test_without_regularisation_it_circles() -> None:
    path = train("none", 0.0)
    radius = radii(path)
    assert min(radius) > 0.9 * radius[0], "it comes no nearer to the equilibrium"
    angles = [math.atan2(psi, theta) for theta, psi in path]
    turned = sum((b - a + math.pi) % (2 * math.pi) - math.pi for a, b in itertools.pairwise(angles))
    assert abs(turned) > 2 * math.pi, "it goes all the way around"


def test_with_r1_it_converges() -> None:
    radius = radii(train("r1", 1.0))
    assert radius[-1] < 1e-2 * radius[0]
