"""Values and parameter gradients of every penalty, against the naive oracle, closed forms and central differences."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from safeloop.penalties.base import Penalty
from safeloop.penalties.forces import Forces
from safeloop.penalties.gradient import GradientPenalty
from safeloop.penalties.gradients import Field, normalized, norms
from safeloop.penalties.hessian_trace import HessianTrace
from safeloop.penalties.input_gradient import InputGradient
from safeloop.penalties.jacobian import Jacobian
from safeloop.penalties.output_jacobian import OutputJacobian
from safeloop.penalties.r1 import R1
from safeloop.penalties.r2 import R2
from safeloop.penalties.spectral import SpectralNorm
from safeloop.penalties.union import PENALTIES
from safeloop.penalties.zero_centred import ZeroCentred

_spec = importlib.util.spec_from_file_location("penalty_oracle", Path(__file__).with_name("oracle.py"))
assert _spec is not None
assert _spec.loader is not None
oracle = sys.modules["penalty_oracle"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(oracle)
Smooth, points, value_of = oracle.Smooth, oracle.points, oracle.value_of

Naive = Callable[[Any, Tensor], Tensor]


def half_mean_square(function: Any, x: Tensor) -> Tensor:
    return oracle.mean([slope.square().sum() / 2 for slope in oracle.slopes(function, x)])


def towards_one(function: Any, x: Tensor) -> Tensor:
    return oracle.mean([(slope.norm() - 1) ** 2 for slope in oracle.slopes(function, x)])


def above(function: Any, x: Tensor) -> Tensor:
    return oracle.mean([max(slope.norm() - 0.1, torch.zeros(())) ** 2 for slope in oracle.slopes(function, x)])


def exact_jacobian(function: Any, x: Tensor) -> Tensor:
    return oracle.mean([matrix.square().sum() / 2 for matrix in oracle.jacobians(function, x)])


def projected_jacobian(function: Any, x: Tensor) -> Tensor:
    matrices = oracle.jacobians(function, x)
    total = []
    for _ in range(2):
        directions = torch.randn(len(x), 3, dtype=torch.float64)
        directions = directions / directions.norm(dim=1, keepdim=True)
        total += [3 * (v @ matrix).square().sum() / 2 for v, matrix in zip(directions, matrices, strict=True)]
    return oracle.mean(total)


def largest_singular_value(function: Any, x: Tensor) -> Tensor:
    return oracle.mean([torch.linalg.svdvals(matrix)[0] ** 2 / 2 for matrix in oracle.jacobians(function, x)])


def probed_trace(function: Any, x: Tensor) -> Tensor:
    matrices = oracle.hessians(function, x)
    total = []
    for _ in range(3):
        signs = (torch.randint_like(x, 2) * 2 - 1).flatten(1)
        total += [v @ matrix @ v for v, matrix in zip(signs, matrices, strict=True)]
    return oracle.mean(total)


CASES: list[tuple[Penalty, int, Naive]] = [
    (GradientPenalty(target=1.0), 1, towards_one),
    (GradientPenalty(target=0.1, sided="one"), 1, above),
    (GradientPenalty(), 1, lambda f, x: 2 * half_mean_square(f, x)),
    (R1(), 1, half_mean_square),
    (R2(), 1, half_mean_square),
    (ZeroCentred(), 1, half_mean_square),
    (InputGradient(), 1, half_mean_square),
    (Jacobian(projections=2), 3, projected_jacobian),
    (Jacobian(), 1, exact_jacobian),
    (OutputJacobian(), 3, exact_jacobian),
    (SpectralNorm(iterations=300), 3, largest_singular_value),
    (HessianTrace(probes=3), 1, probed_trace),
]
NAMES = [f"{penalty.type}-{index}" for index, (penalty, _, _) in enumerate(CASES)]


def test_every_penalty_has_a_case() -> None:
    assert {penalty.type for penalty, _, _ in CASES} | {"forces"} == PENALTIES.keys()


@pytest.mark.parametrize(("penalty", "outputs", "naive"), CASES, ids=NAMES)
def test_the_value_is_that_of_the_naive_loop(penalty: Penalty, outputs: int, naive: Naive) -> None:
    model, x = Smooth(outputs), points()
    torch.manual_seed(1)
    found = value_of(penalty, model, x)
    torch.manual_seed(1)
    wanted = naive(model, x)
    assert found.dim() == 0
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert found.item() != 0


@pytest.mark.parametrize(("penalty", "outputs", "naive"), CASES, ids=NAMES)
def test_the_gradient_is_the_central_difference_of_the_naive_loop(penalty: Penalty, outputs: int, naive: Naive) -> None:
    model, x = Smooth(outputs), points()
    parameters = list(model.parameters())
    torch.manual_seed(1)
    found = torch.autograd.grad(value_of(penalty, model, x), parameters, allow_unused=True, materialize_grads=True)

    def value() -> Tensor:
        torch.manual_seed(1)
        return naive(model, x)

    assert oracle.relative(list(found), oracle.central_differences(value, parameters)) < 1e-6


@pytest.mark.parametrize(("penalty", "outputs", "naive"), CASES, ids=NAMES)
def test_first_and_second_derivatives_pass_torchs_own_checks(penalty: Penalty, outputs: int, naive: Naive) -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    first = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    last = torch.randn(outputs, 4, dtype=torch.float64, requires_grad=True)

    def value(first: Tensor, last: Tensor) -> Tensor:
        torch.manual_seed(1)
        at = x.clone().requires_grad_()
        return penalty.value(Field(torch.tanh(at @ first.T) @ last.T, at))

    assert torch.autograd.gradcheck(value, (first, last))
    if not isinstance(penalty, SpectralNorm):  # its vectors are held, so that only its first derivative is exact
        assert torch.autograd.gradgradcheck(value, (first, last))


# ------------------------------------------------------------------------------------------------------ closed forms


class Quadratic(nn.Module):
    """`f(x) = x^T A x / 2 + b^T x`, with gradient `A x + b` and Hessian `A`."""

    def __init__(self) -> None:
        super().__init__()
        matrix = torch.randn(3, 3, dtype=torch.float64)
        self.A = nn.Parameter(matrix + matrix.T)
        self.b = nn.Parameter(torch.randn(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return ((x @ self.A) * x).sum(1) / 2 + x @ self.b


def test_r1_of_a_quadratic_function_is_known_with_its_gradients() -> None:
    model, x = Quadratic(), torch.randn(5, 3, dtype=torch.float64)
    value = value_of(R1(), model, x)
    slopes = x @ model.A.detach() + model.b.detach()
    assert value.item() == pytest.approx(slopes.square().sum(1).mean().item() / 2, rel=1e-12)
    by_matrix, by_vector = torch.autograd.grad(value, [model.A, model.b])
    assert torch.allclose(by_vector, slopes.mean(0), rtol=1e-12)
    outer = torch.einsum("ni,nj->ij", slopes, x) / 5
    assert torch.allclose(by_matrix, (outer + outer.T) / 2, rtol=1e-12), "A enters by its symmetric part"


def test_the_gradient_penalty_of_a_linear_critic_depends_on_its_weight_alone() -> None:
    critic, x = nn.Linear(3, 1).double(), torch.randn(5, 3, dtype=torch.float64)
    value = value_of(GradientPenalty(target=1.0), critic, x)
    norm = critic.weight.detach().norm()
    assert value.item() == pytest.approx((norm.item() - 1) ** 2, rel=1e-12)
    (gradient,) = torch.autograd.grad(value, critic.weight)
    assert torch.allclose(gradient, 2 * (norm - 1) * critic.weight.detach() / norm, rtol=1e-12)


def test_the_trace_of_a_diagonal_hessian_is_exact_with_one_probe() -> None:
    scale = nn.Parameter(torch.tensor([1.0, 2.0, -5.0], dtype=torch.float64))
    value = value_of(HessianTrace(), lambda x: (scale * x.square()).sum(1) / 2, torch.randn(4, 3, dtype=torch.float64))
    assert value.item() == pytest.approx(-2.0, rel=1e-12)
    (gradient,) = torch.autograd.grad(value, scale)
    assert gradient.tolist() == pytest.approx([1.0, 1.0, 1.0], rel=1e-12)


def test_the_spectral_norm_of_a_linear_layer_is_that_of_its_weight() -> None:
    layer = nn.Linear(4, 3).double()
    value = value_of(SpectralNorm(iterations=500), layer, torch.randn(1, 4, dtype=torch.float64))
    u, s, v = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    assert value.item() == pytest.approx(s[0].item() ** 2 / 2, rel=1e-9)
    (gradient,) = torch.autograd.grad(value, layer.weight)
    assert torch.allclose(gradient, s[0] * torch.outer(u[:, 0], v[0]), rtol=1e-6)


def test_a_zero_jacobian_has_spectral_norm_zero_and_no_nan() -> None:
    layer = nn.Linear(4, 3).double()
    nn.init.zeros_(layer.weight)
    value = value_of(SpectralNorm(), layer, torch.randn(2, 4, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(value, layer.weight)
    assert value.item() == 0
    assert bool(gradient.isfinite().all())


def test_forces_of_a_harmonic_spring_are_known() -> None:
    stiffness = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    targets = -2.0 * x
    field = oracle.evaluated(lambda x: stiffness * x.square().sum((1, 2)) / 2, x, targets=targets)
    value = Forces().value(field)
    assert value.item() == pytest.approx((-3.0 + 2.0) ** 2 * x.square().mean().item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(value, stiffness)
    assert gradient.item() == pytest.approx(2 * (3.0 - 2.0) * x.square().mean().item(), rel=1e-12)


def test_forces_of_a_sum_of_energies_are_those_of_the_energies() -> None:
    stiffness = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    each = value_of(Forces(), lambda x: stiffness * x.square().sum((1, 2)), x, targets=x)
    total = value_of(Forces(), lambda x: stiffness * x.square().sum(), x, targets=x)
    assert each.item() == total.item()


@pytest.mark.parametrize("penalty", [case[0] for case in CASES if case[0].type != "forces"], ids=NAMES)
def test_samples_of_a_single_number_need_no_second_dimension(penalty: Penalty) -> None:
    """`[N]` to `[N]`, of `c x^3`: the slope is `3 c x^2`, the second derivative `6 c x`."""
    x, c = torch.tensor([1.0, 2.0], dtype=torch.float64), nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    flat = value_of(penalty, lambda x: c * x**3, x)
    column = value_of(penalty, lambda x: c * x**3, x.unsqueeze(1))
    assert flat.item() == pytest.approx(column.item(), rel=1e-12)
    if penalty.type == "hessian_trace":
        assert flat.item() == pytest.approx(6 * 0.5 * 1.5, rel=1e-12)
    elif isinstance(penalty, R1 | Jacobian | SpectralNorm):
        assert flat.item() == pytest.approx((1.5**2 + 6.0**2) / 2 / 2, rel=1e-12)


# -------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("penalty", [Jacobian(), HessianTrace()], ids=["jacobian", "hessian_trace"])
def test_a_random_estimate_has_the_exact_value_as_its_mean(penalty: Penalty) -> None:
    outputs = 3 if penalty.type == "jacobian" else 1
    model, x = Smooth(outputs), points(2)
    with torch.no_grad():
        drawn = torch.stack([value_of_detached(penalty, model, x) for _ in range(2000)])
    matrices = oracle.jacobians(model, x) if penalty.type == "jacobian" else oracle.hessians(model, x)
    exact = oracle.mean([m.square().sum() / 2 if penalty.type == "jacobian" else m.trace() for m in matrices])
    assert abs(drawn.mean() - exact) < 4 * drawn.std() / len(drawn) ** 0.5
    assert drawn.std() > 0


def value_of_detached(penalty: Penalty, model: nn.Module, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return value_of(penalty, model, x).detach()


@settings(deadline=None, max_examples=25)
@given(
    kind=st.sampled_from([case for case in CASES if case[0].type not in ("jacobian", "hessian_trace", "spectral")]),
    size=st.integers(1, 6),
    seed=st.integers(0, 2**31),
)
def test_a_penalty_is_the_mean_of_its_samples_in_any_order(kind: Any, size: int, seed: int) -> None:
    torch.manual_seed(seed)
    penalty, outputs, _ = kind
    model, x = Smooth(outputs), points(size)
    whole = value_of(penalty, model, x).item()
    parts = [value_of(penalty, model, x[i : i + 1]).item() for i in range(size)]
    assert whole == pytest.approx(sum(parts) / size, rel=1e-9)
    assert value_of(penalty, model, x[torch.randperm(size)]).item() == pytest.approx(whole, rel=1e-9)


@settings(deadline=None, max_examples=25)
@given(factor=st.floats(0.1, 10), seed=st.integers(0, 2**31))
def test_a_squared_norm_grows_with_the_square_of_the_function(factor: float, seed: int) -> None:
    torch.manual_seed(seed)
    model, x = Smooth(), points()
    assert value_of(R1(), lambda x: factor * model(x), x).item() == pytest.approx(
        factor**2 * value_of(R1(), model, x).item(), rel=1e-9
    )


def test_the_norm_is_over_all_features_of_a_sample() -> None:
    """The norm over one dimension of an image is the mistake that is written by hand most often."""
    rows = torch.ones(2, 3, 4, 4)
    assert norms(rows).tolist() == pytest.approx([48**0.5] * 2)
    assert norms(torch.tensor([3.0, -4.0])).tolist() == [3.0, 4.0]


def test_where_the_gradient_is_zero_the_derivative_of_the_norm_is_zero_and_finite() -> None:
    critic, x = nn.Linear(3, 1).double(), torch.randn(5, 3, dtype=torch.float64)
    nn.init.zeros_(critic.weight)
    value = value_of(GradientPenalty(target=1.0), critic, x)
    (gradient,) = torch.autograd.grad(value, critic.weight)
    assert value.item() == 1.0
    assert gradient.tolist() == [[0.0, 0.0, 0.0]]


def test_a_zero_row_is_normalized_to_zero() -> None:
    assert normalized(torch.tensor([[0.0, 0.0], [3.0, 4.0]])).tolist() == [[0.0, 0.0], pytest.approx([0.6, 0.8])]


def test_the_inner_pass_of_a_half_precision_value_may_be_scaled_and_is_unscaled() -> None:
    """Without the scale these gradients, 6e-9, are below what fp16 can hold."""
    x = torch.randn(4, 3, requires_grad=True)
    weight = torch.full((3, 1), 6e-5, requires_grad=True)
    score = (x.half() @ weight.half()) * torch.full((), 1e-4, dtype=torch.float16)
    scale = torch.full((), 2.0**16)
    wanted = 3 * (6e-9) ** 2 / 2
    assert R1().value(Field(score, x)).item() == 0
    value = R1().value(Field(score, x, scale=scale))
    assert value.item() / wanted == pytest.approx(1, rel=0.02)
    assert value.dtype == torch.float32


def test_a_penalty_of_half_precision_rows_is_summed_in_float32() -> None:
    x = torch.randn(2, 5, dtype=torch.float16, requires_grad=True)
    assert R1().value(Field((300 * x).sum(1), x)).item() == pytest.approx(5 * 300**2 / 2)
