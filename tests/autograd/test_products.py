"""Products and curvature against matrices that are formed: closed forms, torch.func, central differences; float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import safeloop as sl

Named = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return net, torch.randn(7, 3), torch.randn(7, 2)


def loss_of(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (net(x) - y).square().mean() + net(x).exp().mean()


def like(net: nn.Module, seed: int) -> Named:
    torch.manual_seed(seed)
    return {name: torch.randn_like(p) for name, p in net.named_parameters()}


def flat(named: Named) -> Tensor:
    return torch.cat([part.reshape(-1) for part in named.values()])


def dense(net: nn.Module, function) -> Tensor:
    """The Hessian over all parameters as one matrix: the oracle."""
    named = {name: p.detach() for name, p in net.named_parameters()}
    blocks = jacrev(jacrev(function))(named)
    rows = [torch.cat([blocks[a][b].reshape(named[a].numel(), named[b].numel()) for b in named], dim=1) for a in named]
    return torch.cat(rows)


def dense_of(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self) -> Tensor:
            return loss_of(self.net, x, y)

    whole = Whole()
    named = dict(whole.named_parameters())
    return dense(whole, lambda values: functional_call(whole, dict(zip(named, values.values(), strict=True)), ()))


def test_hvp_is_the_hessian_times_the_vector():
    net, x, y = make()
    vector = like(net, 1)
    expected = dense_of(net, x, y) @ flat(vector)
    from_function = sl.autograd.hvp(lambda: loss_of(net, x, y), net, vector)
    from_graph = sl.autograd.hvp(loss_of(net, x, y), dict(net.named_parameters()), vector)
    torch.testing.assert_close(flat(from_function), expected, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(from_function[name], from_graph[name]) for name in vector)


def test_hvp_is_the_central_difference_of_the_gradient():
    net, x, y = make()
    vector = like(net, 2)
    found = flat(sl.autograd.hvp(lambda: loss_of(net, x, y), net, vector))

    def gradient(step: float) -> Tensor:
        moved = {name: (p + step * vector[name]).detach().requires_grad_() for name, p in net.named_parameters()}
        out = functional_call(net, moved, (x,))
        return flat(
            dict(enumerate(torch.autograd.grad((out - y).square().mean() + out.exp().mean(), list(moved.values()))))
        )

    h = 1e-5
    difference = (gradient(h) - gradient(-h)) / (2 * h)
    assert float((found - difference).norm() / found.norm()) <= 1e-6


@given(st.integers(1, 6), st.integers(0, 10_000))
@settings(deadline=None, max_examples=20)
def test_hvp_of_a_quadratic_form_is_its_matrix(n: int, seed: int):
    torch.manual_seed(seed)
    matrix = torch.randn(n, n)
    symmetric = matrix + matrix.T
    w, v = torch.randn(n, requires_grad=True), torch.randn(n)
    found = sl.autograd.hvp(lambda: 0.5 * w @ symmetric @ w, {"w": w}, {"w": v})["w"]
    torch.testing.assert_close(found, symmetric @ v)


def test_vjp_and_jvp_are_the_jacobian_times_vectors():
    net, x, _ = make()
    named = {name: p.detach() for name, p in net.named_parameters()}
    blocks = jacrev(lambda values: functional_call(net, values, (x,)))(named)
    jacobian = torch.cat([block.reshape(14, -1) for block in blocks.values()], dim=1)
    seed, along = torch.randn(7, 2), like(net, 3)
    torch.testing.assert_close(flat(sl.autograd.vjp(lambda: net(x), net, seed)), jacobian.T @ seed.reshape(-1))
    torch.testing.assert_close(sl.autograd.jvp(lambda: net(x), net, along).reshape(-1), jacobian @ flat(along))
    left = (sl.autograd.jvp(net(x), net, along) * seed).sum()
    right = flat(sl.autograd.vjp(net(x), net, seed)) @ flat(along)
    torch.testing.assert_close(left, right)


def test_gauss_newton_is_j_transposed_h_j_and_the_hessian_of_a_linear_model():
    net, x, y = make()
    vector = like(net, 4)
    named = {name: p.detach() for name, p in net.named_parameters()}
    blocks = jacrev(lambda values: functional_call(net, values, (x,)))(named)
    jacobian = torch.cat([block.reshape(14, -1) for block in blocks.values()], dim=1)
    inner = jacrev(jacrev(lambda z: (z - y).square().mean() + z.exp().mean()))(net(x).detach()).reshape(14, 14)
    found = sl.autograd.gauss_newton_product(
        lambda: net(x), lambda z: (z - y).square().mean() + z.exp().mean(), net, vector
    )
    torch.testing.assert_close(flat(found), jacobian.T @ inner @ jacobian @ flat(vector))

    linear, labels = nn.Linear(3, 2), torch.tensor([0, 1, 1, 0, 1, 0, 0])
    along = like(linear, 5)
    product = sl.autograd.gauss_newton_product(
        lambda: linear(x), lambda z: nn.functional.cross_entropy(z, labels), linear, along
    )
    hessian = sl.autograd.hvp(lambda: nn.functional.cross_entropy(linear(x), labels), linear, along)
    torch.testing.assert_close(flat(product), flat(hessian))


def test_the_hessian_of_a_logistic_regression_is_xt_s_x():
    torch.manual_seed(0)
    x, y, w = torch.randn(20, 4), torch.randint(0, 2, (20,)).double(), torch.randn(4, requires_grad=True)
    p = torch.sigmoid(x @ w).detach()
    hessian = x.T @ torch.diag(p * (1 - p)) @ x

    def loss() -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(x @ w, y, reduction="sum")

    v = torch.randn(4)
    torch.testing.assert_close(sl.autograd.hvp(loss, {"w": w}, {"w": v})["w"], hessian @ v)
    top = sl.autograd.top_eigenvalue(loss, {"w": w}, iterations=4, tolerance=0.0)
    values, vectors = torch.linalg.eigh(hessian)
    torch.testing.assert_close(top.value, values[-1])
    torch.testing.assert_close((top.vector["w"] @ vectors[:, -1]).abs(), torch.tensor(1.0))


def test_lanczos_and_power_iteration_find_the_ends_of_the_spectrum_and_say_how_sure_they_are():
    net, x, y = make()
    values = torch.linalg.eigvalsh(dense_of(net, x, y))
    top = sl.autograd.top_eigenvalue(lambda: loss_of(net, x, y), net, iterations=26, tolerance=1e-9)
    assert float((top.value - values[-1]).abs() / values[-1]) <= 1e-6
    largest = values[values.abs().argmax()]
    power = sl.autograd.power_iteration(lambda: loss_of(net, x, y), net, iterations=3000, tolerance=1e-8)
    assert float((power.value - largest).abs() / largest.abs()) <= 1e-6
    for few in (1, 2, 5):
        rough = sl.autograd.top_eigenvalue(lambda: loss_of(net, x, y), net, iterations=few, tolerance=0.0)
        assert rough.num_products == few
        assert float((values - rough.value).abs().min()) <= float(rough.residual) * (1 + 1e-9)


def test_lanczos_finds_the_algebraically_largest_where_a_negative_one_is_larger():
    scales = torch.tensor([-9.0, 1.0, 4.0])
    w = torch.ones(3, requires_grad=True)
    top = sl.autograd.top_eigenvalue(lambda: 0.5 * (scales * w * w).sum(), {"w": w})
    power = sl.autograd.power_iteration(lambda: 0.5 * (scales * w * w).sum(), {"w": w})
    assert float(top.value) == pytest.approx(4.0)
    assert float(power.value) == pytest.approx(-9.0, rel=1e-3)


def test_lanczos_stops_where_the_space_is_exhausted():
    w = torch.ones(5, requires_grad=True)
    top = sl.autograd.top_eigenvalue(lambda: 1.5 * (w * w).sum(), {"w": w})
    assert top.num_products == 1
    assert float(top.value) == pytest.approx(3.0)
    assert float(top.residual) == pytest.approx(0.0, abs=1e-12)


def test_trace_and_diagonal_are_exact_where_the_hessian_is_diagonal():
    scales = torch.tensor([1.0, -2.0, 5.0])
    w = torch.randn(3, requires_grad=True)

    def loss() -> Tensor:
        return 0.5 * (scales * w * w).sum()

    trace = sl.autograd.hessian_trace(loss, {"w": w}, probes=3)
    assert float(trace.value) == pytest.approx(4.0)
    assert float(trace.error) == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(sl.autograd.hessian_diagonal(loss, {"w": w}, probes=1)["w"], scales)
    assert math.isnan(float(sl.autograd.hessian_trace(loss, {"w": w}, probes=1).error))


def test_trace_and_diagonal_are_unbiased_within_their_standard_error():
    net, x, y = make()
    matrix = dense_of(net, x, y)
    trace = sl.autograd.hessian_trace(lambda: loss_of(net, x, y), net, probes=400)
    assert float((trace.value - matrix.trace()).abs()) <= 4 * float(trace.error)
    off = matrix - torch.diag(matrix.diagonal())
    assert float(trace.error) == pytest.approx(float((2 * off.square().sum() / 400).sqrt()), rel=0.3)
    diagonal = flat(sl.autograd.hessian_diagonal(lambda: loss_of(net, x, y), net, probes=400))
    deviation = (off.square().sum(1) / 400).sqrt()
    assert bool(((diagonal - matrix.diagonal()).abs() <= 5 * deviation + 1e-12).all())


def test_the_generator_decides_the_probes_and_the_default_is_always_the_same():
    net, x, y = make()

    def trace(seed: int | None) -> float:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return float(sl.autograd.hessian_trace(lambda: loss_of(net, x, y), net, probes=2, generator=generator).value)

    assert trace(3) == trace(3) != trace(4)
    assert trace(None) == trace(None) == trace(0)


class Noisy(nn.Module):
    """Draws random numbers and keeps running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails: bool):
    torch.manual_seed(0)
    net, x = Noisy(), torch.randn(8, 3)
    net.layers[3].eval()
    net(x).sum().backward()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    gradients = [p.grad.clone() for p in net.parameters()]
    held = [id(p.grad) for p in net.parameters()]
    modes = [module.training for module in net.modules()]
    net.layers[3].train()
    modes[[*net.modules()].index(net.layers[3])] = True
    random_state = torch.get_rng_state()

    def loss() -> Tensor:
        value = net(x).square().mean()
        if fails:
            raise RuntimeError("no")
        return value

    vector = like(net, 1)
    torch.set_rng_state(random_state)
    calls = [
        lambda: sl.autograd.hvp(loss, net, vector),
        lambda: sl.autograd.jvp(loss, net, vector),
        lambda: sl.autograd.vjp(loss, net, torch.tensor(1.0)),
        lambda: sl.autograd.hessian_trace(loss, net, probes=2),
        lambda: sl.autograd.hessian_diagonal(loss, net, probes=2),
        lambda: sl.autograd.top_eigenvalue(loss, net, iterations=2),
        lambda: sl.autograd.power_iteration(loss, net, iterations=2),
        lambda: sl.autograd.gauss_newton_product(loss, lambda z: z.square(), net, vector),
    ]
    for call in calls:
        if fails:
            with pytest.raises(RuntimeError, match="no"):
                call()
        else:
            call()
        assert torch.equal(torch.get_rng_state(), random_state)
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        assert [id(p.grad) for p in net.parameters()] == held
        assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), gradients, strict=True))
        assert [module.training for module in net.modules()] == modes


def test_a_graph_that_was_given_can_be_used_again():
    net, x, y = make()
    loss, vector = loss_of(net, x, y), like(net, 1)
    first = sl.autograd.hvp(loss, net, vector)
    again = sl.autograd.hvp(loss, net, vector)
    assert all(torch.equal(first[name], again[name]) for name in vector)
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())


def test_what_the_loss_does_not_depend_on_is_zero():
    w, other = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)
    both = {"w": w, "other": other}
    vector = {"w": torch.ones(3), "other": torch.ones(2)}
    product = sl.autograd.hvp(lambda: (w**3).sum(), both, vector)
    torch.testing.assert_close(product["w"], 6 * w.detach())
    assert torch.equal(product["other"], torch.zeros(2))
    flat_loss = sl.autograd.hvp(lambda: w.sum() + other.sum(), both, vector)
    assert all(torch.equal(part, torch.zeros_like(part)) for part in flat_loss.values())
    assert float(sl.autograd.top_eigenvalue(lambda: w.sum(), both).value) == 0.0


def test_it_works_where_grad_mode_is_off():
    net, x, y = make()
    vector = like(net, 1)
    expected = flat(sl.autograd.hvp(lambda: loss_of(net, x, y), net, vector))
    with torch.no_grad():
        assert torch.equal(flat(sl.autograd.hvp(lambda: loss_of(net, x, y), net, vector)), expected)
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: sl.autograd.hvp(lambda: w * w, {"w": w}, {"w": w}), r"0-d loss, and this one has the shape \[2\]"),
        (lambda w: sl.autograd.hvp(lambda: w.sum(), {"w": w}, {}), "no part for `w`"),
        (lambda w: sl.autograd.hvp(lambda: w.sum(), {"w": w}, {"w": w, "b": w}), "`b`, which is no parameter"),
        (lambda w: sl.autograd.hvp(lambda: w.sum(), {"w": w}, {"w": w[:1]}), r"shape \[1\], not \[2\]"),
        (lambda w: sl.autograd.hvp(lambda: w.sum(), {"w": w.detach()}, {"w": w}), "`w` does not require grad"),
        (lambda w: sl.autograd.hvp(lambda: w.sum(), nn.ReLU(), {"w": w}), "no parameter that requires grad"),
        (lambda w: sl.autograd.hessian_trace(lambda: w.sum(), {"w": w}, probes=0), "probes is 0"),
        (lambda w: sl.autograd.top_eigenvalue(lambda: w.sum(), {"w": w}, iterations=0), "iterations is 0"),
    ],
)
def test_what_does_not_fit_is_refused(call, message: str):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, requires_grad=True))
