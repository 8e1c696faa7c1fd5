"""Readings of the Hessian through products with vectors: trace, diagonal, largest eigenvalue.

Random probes come from a generator of their own (seeded with 0 where none is given): the global random state stays as
it is. What the arguments may be: see `products`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from safeloop.autograd.products import Function, HessianProducts, Parameters

Product = Callable[[Sequence[Tensor]], "list[Tensor]"]


class Estimate(NamedTuple):
    """A mean over random probes, and how far to trust it."""

    value: Tensor
    """0-d"""
    error: Tensor
    """0-d: the standard error of the mean; NaN from a single probe"""


class Eigenvalue(NamedTuple):
    """An eigenvalue of the Hessian, and how far to trust it."""

    value: Tensor
    """0-d"""
    residual: Tensor
    """0-d: `||H v - value v||` for the unit vector v; some eigenvalue of H lies within this of `value`"""
    vector: dict[str, Tensor]
    """v, as the parameters"""
    num_products: int
    """Hessian-vector products that it took"""


def hessian_trace(
    loss: Function, parameters: Parameters, *, probes: int = 16, generator: torch.Generator | None = None
) -> Estimate:
    """Hutchinson's estimate of the trace of the Hessian: the mean of `z^T H z` over random signs z.

    Unbiased; exact for a diagonal Hessian; its variance is twice the sum of the squared off-diagonal entries, divided
    by `probes`. Cost: a gradient that records itself, then about two gradients for each probe.

    Source:
        M. F. Hutchinson, "A stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines",
        Communications in Statistics 18 (1989).
    """
    _at_least_one("probes", probes)
    with HessianProducts(loss, parameters) as product:
        draw = _signs(product.tensors, generator)
        samples = []
        for _ in range(probes):
            signs = draw()
            samples.append(_dot(signs, product(signs)))
    values = torch.stack(samples)
    spread = values.std() if probes > 1 else values.new_full((), torch.nan)
    return Estimate(values.mean(), spread / probes**0.5)


def hessian_diagonal(
    loss: Function, parameters: Parameters, *, probes: int = 16, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """An estimate of the diagonal of the Hessian: the mean of `z * (H z)` over random signs z, as the parameters.

    Unbiased; exact for a diagonal Hessian; entry i has the variance `sum_{j != i} H_ij^2 / probes`. Cost: a gradient
    that records itself, then about two gradients for each probe.

    Source:
        C. Bekas, E. Kokiopoulou, Y. Saad, "An estimator for the diagonal of a matrix", Applied Numerical Mathematics 57
        (2007), with random signs: there the denominator `z * z` is 1.
    """
    _at_least_one("probes", probes)
    with HessianProducts(loss, parameters) as product:
        draw = _signs(product.tensors, generator)
        totals = [torch.zeros_like(tensor) for tensor in product.tensors]
        for _ in range(probes):
            signs = draw()
            torch._foreach_addcmul_(totals, signs, product(signs))
        torch._foreach_div_(totals, float(probes))
        return dict(zip(product.names, totals, strict=True))


def top_eigenvalue(
    loss: Function,
    parameters: Parameters,
    *,
    iterations: int = 20,
    tolerance: float = 1e-3,
    generator: torch.Generator | None = None,
) -> Eigenvalue:
    """The largest eigenvalue of the Hessian, by Lanczos with full reorthogonalisation.

    How to read it: plain gradient descent with a learning rate above `2 / value` moves away from a minimum along this
    vector. After m products the value is the largest that any polynomial of degree m - 1 in H can make of the start.

    Args:
        loss: 0-d.
        parameters: what it is differentiated with respect to.
        iterations: products at most. As many directions are kept, each as large as the parameters: where that is too
            much, `power_iteration` keeps two.
        tolerance: stop once the residual is at most this part of the value.
        generator: draws the start.

    Cost: a gradient that records itself, then about two gradients for each product; a sync each.

    Source:
        C. Lanczos, "An Iteration Method for the Solution of the Eigenvalue Problem of Linear Differential and Integral
        Operators", 1950; B. N. Parlett, "The Symmetric Eigenvalue Problem", 1998, chapter 13.
    """
    _at_least_one("iterations", iterations)
    with HessianProducts(loss, parameters) as product:
        basis = [_normalised(_normal(product.tensors, generator))]
        diagonal: list[float] = []
        beside: list[float] = []
        while True:
            image = product(basis[-1])
            diagonal.append(float(_dot(basis[-1], image)))
            for _ in range(2):  # twice is enough: Parlett, 6.9
                for direction in basis:
                    image = _minus(image, _dot(direction, image), direction)
            rest = _norm(image)
            value, weights = _largest(diagonal, beside)
            residual = float(rest) * abs(float(weights[-1]))
            if residual <= tolerance * abs(value) or len(diagonal) == iterations:
                break
            beside.append(float(rest))
            basis.append([part / rest for part in image])
        vector = _combined(weights, basis)
        like = basis[0][0]
        named = dict(zip(product.names, vector, strict=True))
        return Eigenvalue(like.new_tensor(value), like.new_tensor(residual), named, len(diagonal))


def power_iteration(
    loss: Function,
    parameters: Parameters,
    *,
    iterations: int = 100,
    tolerance: float = 1e-3,
    generator: torch.Generator | None = None,
) -> Eigenvalue:
    """The eigenvalue of the Hessian that is largest in absolute value, by power iteration.

    Converges by the ratio of the two largest for each product, slower than `top_eigenvalue`, and keeps two vectors
    only. Arguments and costs are those of `top_eigenvalue`.
    """
    _at_least_one("iterations", iterations)
    with HessianProducts(loss, parameters) as product:
        vector = _normalised(_normal(product.tensors, generator))
        for done in range(1, iterations + 1):
            image = product(vector)
            value = _dot(vector, image)
            residual = _norm(_minus(image, value, vector))
            if done == iterations or bool(residual <= tolerance * value.abs()):
                break
            vector = _normalised(image)
        return Eigenvalue(value, residual, dict(zip(product.names, vector, strict=True)), done)


def _at_least_one(name: str, number: int) -> None:
    if number < 1:
        raise ValueError(f"{name} is {number}; it is at least 1")


def _generator(tensors: Sequence[Tensor], generator: torch.Generator | None) -> torch.Generator:
    return generator or torch.Generator(device=tensors[0].device).manual_seed(0)


def _signs(tensors: Sequence[Tensor], generator: torch.Generator | None) -> Callable[[], list[Tensor]]:
    """Draws +1 and -1, each with probability 1/2, as `tensors`."""
    chosen = _generator(tensors, generator)

    def draw() -> list[Tensor]:
        return [
            torch.randint(0, 2, t.shape, generator=chosen, device=chosen.device).to(t).mul_(2).sub_(1) for t in tensors
        ]

    return draw


def _normal(tensors: Sequence[Tensor], generator: torch.Generator | None) -> list[Tensor]:
    chosen = _generator(tensors, generator)
    return [torch.randn(t.shape, generator=chosen, device=chosen.device, dtype=t.dtype).to(t.device) for t in tensors]


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    device = left[0].device
    return torch.stack([(a * b).sum().to(device) for a, b in zip(left, right, strict=True)]).sum()


def _norm(vector: Sequence[Tensor]) -> Tensor:
    return _dot(vector, vector).sqrt()


def _normalised(vector: Sequence[Tensor]) -> list[Tensor]:
    norm = _norm(vector)
    return [part / norm for part in vector] if bool(norm > 0) else list(vector)


def _minus(vector: Sequence[Tensor], factor: Tensor, other: Sequence[Tensor]) -> list[Tensor]:
    return [a - factor.to(a.device) * b for a, b in zip(vector, other, strict=True)]


def _largest(diagonal: Sequence[float], beside: Sequence[float]) -> tuple[float, Tensor]:
    """The largest eigenvalue of a symmetric tridiagonal matrix, and its vector."""
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64, device="cpu"))
    if beside:
        off = torch.tensor(beside, dtype=torch.float64, device="cpu")
        matrix = matrix + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(matrix)
    return float(values[-1]), vectors[:, -1]


def _combined(weights: Tensor, basis: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    columns = zip(*basis, strict=True)
    return [torch.stack([float(w) * v for w, v in zip(weights, column, strict=True)]).sum(0) for column in columns]
