"""Burgers' equation solved by a net: Adam, then LBFGS, in one run of two stages. See `configs/burgers.yaml`.

    u_t + u u_x = (0.01 / pi) u_xx,   u(x, 0) = -sin(pi x),   u(-1, t) = u(1, t) = 0,   -1 <= x <= 1, 0 <= t <= 1

Run it with `safeloop train configs/burgers.yaml`; `docs/burgers.md` says what to expect. The problem is that of
M. Raissi, P. Perdikaris, G. E. Karniadakis, "Physics-informed neural networks", Journal of Computational Physics 378
(2019), appendix A, who report a relative error of 6.7e-4.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import safeloop as sl

VISCOSITY = 0.01 / math.pi


def exact(x: NDArray[np.float64], t: NDArray[np.float64], nodes: int = 120) -> NDArray[np.float64]:
    """The solution at points `[...]`, by the transform of Cole and Hopf and Gauss-Hermite quadrature.

    With `F(y) = exp(-cos(pi y) / (2 pi nu))`, `u = -int sin(pi y) F(y) G(x - y) dy / int F(y) G(x - y) dy`, G the heat
    kernel of variance `2 nu t`.

    Source: C. Basdevant et al., "Spectral and finite difference solutions of the Burgers equation", Computers & Fluids
    14 (1986), equation 4.
    """
    roots, weights = np.polynomial.hermite.hermgauss(nodes)
    y = x[..., None] - np.sqrt(4 * VISCOSITY * t)[..., None] * roots
    exponent = -np.cos(np.pi * y) / (2 * np.pi * VISCOSITY)
    kernel = weights * np.exp(exponent - exponent.max(-1, keepdims=True))
    solution: NDArray[np.float64] = -(np.sin(np.pi * y) * kernel).sum(-1) / kernel.sum(-1)
    return solution


class Points(DataLoader):
    """All points of the equation, the start and the walls, as one ready batch: LBFGS wants one fixed objective.

    Inside, a scrambled Sobol sequence in (s, t), with `x = a s + (1 - a) s^3`: five times denser at x = 0, where the
    shock forms, than evenly spread. `weight` is dx/ds, so that the weighted mean is still the mean over the domain.
    """

    def __init__(self, inside: int = 4000, start: int = 201, walls: int = 101, density: float = 0.2) -> None:
        drawn = torch.quasirandom.SobolEngine(2, scramble=True, seed=0).draw(inside).double()
        s, t = 2 * drawn[:, :1] - 1, drawn[:, 1:]
        edges = torch.tensor([-1.0, 1.0]).double().repeat_interleave(walls).unsqueeze(1)
        batch = {
            "x": density * s + (1 - density) * s**3,
            "t": t,
            "weight": density + 3 * (1 - density) * s**2,
            "start": torch.linspace(-1, 1, start).double().unsqueeze(1),
            "edge": edges,
            "edge_t": torch.linspace(0, 1, walls).double().repeat(2).unsqueeze(1),
        }
        super().__init__([batch], batch_size=None)


class Grid(TensorDataset):
    """The exact solution where Raissi et al. compare: 256 points in x, 100 in t. A sample is (x, t, u)."""

    def __init__(self) -> None:
        x, t = np.meshgrid(np.linspace(-1, 1, 256), np.linspace(0, 0.99, 100))
        super().__init__(*(torch.from_numpy(one.reshape(-1, 1).copy()) for one in (x, t, exact(x, t))))


class Net(nn.Sequential):
    """From x and t `[N, 1]` to u `[N, 1]`: tanh throughout, float64, as LBFGS stops early on float32's rounding."""

    def __init__(self, width: int = 20, depth: int = 6) -> None:
        sizes = [2, *([width] * depth)]
        layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())]
        super().__init__(*layers, nn.Linear(width, 1))
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(layer.bias)
        self.double()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """One u for each row."""
        u: Tensor = super().forward(torch.cat([x, t], 1))
        return u


class Burgers(sl.Trainer):
    """Three terms, each a mean of squares: the equation inside, the start, the walls."""

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The equation's residual at the points inside, and how far start and walls are from what they must be."""
        x, t = (batch[name].detach().requires_grad_() for name in ("x", "t"))
        u = self.model(x, t)
        d = sl.derivatives(u, at={"x": x, "t": t})
        residual = d.t + u * d.x - VISCOSITY * d.xx
        start, edge = batch["start"], batch["edge"]
        return {
            "equation": (batch["weight"] * residual.square()).mean(),
            "start": (self.model(start, torch.zeros_like(start)) + torch.sin(math.pi * start)).square().mean(),
            "walls": self.model(edge, batch["edge_t"]).square().mean(),
        }

    def metrics(self, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, object]:
        """The relative L2 error over the whole grid, and the largest error."""
        if not hasattr(self, "error"):
            self.error = RelativeError()
        x, t, u = batch
        self.error.update(self.model(x, t), u)
        return {"error": self.error}


class RelativeError:
    """`||found - exact|| / ||exact||` over all batches, and the largest absolute difference."""

    def __init__(self) -> None:
        self.reset()

    def update(self, found: Tensor, expected: Tensor) -> None:
        """Add a batch."""
        difference = found - expected
        self.off = self.off + difference.square().sum()
        self.whole = self.whole + expected.square().sum()
        self.largest = torch.maximum(self.largest.to(difference), difference.abs().max())

    def compute(self) -> dict[str, float]:
        """Both numbers."""
        return {"relative_l2": float((self.off / self.whole).sqrt()), "largest": float(self.largest)}

    def reset(self) -> None:
        """Start anew."""
        self.off, self.whole, self.largest = (torch.zeros((), dtype=torch.float64) for _ in range(3))
