"""Derivatives at inputs against closed forms and central differences, float64; and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import safeloop as sl


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def points(n: int = 5, dims: int = 2) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    shape = (n, 1) if dims == 2 else (n,)
    return torch.rand(shape, requires_grad=True), torch.rand(shape, requires_grad=True)


@pytest.mark.parametrize("dims", [1, 2])
def test_derivatives_of_a_closed_form(dims: int):
    x, t = points(dims=dims)
    u = torch.sin(2 * x) * torch.exp(-3 * t) + x * t**2
    d = sl.derivatives(u, at={"x": x, "t": t})
    s, c, e = torch.sin(2 * x), torch.cos(2 * x), torch.exp(-3 * t)
    expected = {
        "x": 2 * c * e + t**2,
        "t": -3 * s * e + 2 * x * t,
        "xx": -4 * s * e,
        "xt": -6 * c * e + 2 * t,
        "tx": -6 * c * e + 2 * t,
        "tt": 9 * s * e + 2 * x,
        "xxt": 12 * s * e,
        "xxxx": 16 * s * e,
    }
    for names, value in expected.items():
        assert getattr(d, names).shape == u.shape
        torch.testing.assert_close(getattr(d, names), value)
    by_position = sl.derivatives(u, at=(x, t))
    torch.testing.assert_close(by_position[0, 0], expected["xx"])
    torch.testing.assert_close(by_position[1], expected["t"])
    assert d["x", "t"] is d["t", "x"] is d.xt


def test_derivatives_of_a_net_are_central_differences_and_train_it():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    x, t = points()

    def u(x: Tensor, t: Tensor) -> Tensor:
        return net(torch.cat([x, t], 1))

    d = sl.derivatives(u(x, t), at=(x, t))
    with torch.no_grad():
        h = 1e-4
        first = (u(x + h, t) - u(x - h, t)) / (2 * h)
        second = (u(x + h, t) - 2 * u(x, t) + u(x - h, t)) / h**2
    assert float((d[0].detach() - first).norm() / first.norm()) <= 1e-6
    assert float((d[0, 0].detach() - second).norm() / second.norm()) <= 1e-6

    loss = (d[1] + u(x, t) * d[0] - 0.1 * d[0, 0]).square().mean()
    gradient = torch.autograd.grad(loss, list(net.parameters()))
    along = [torch.randn_like(g) for g in gradient]

    def moved(step: float) -> float:
        with torch.no_grad():
            for p, v in zip(net.parameters(), along, strict=True):
                p += step * v
        one = sl.derivatives(u(x, t), at=(x, t))
        value = float((one[1] + u(x, t) * one[0] - 0.1 * one[0, 0]).square().mean().detach())
        with torch.no_grad():
            for p, v in zip(net.parameters(), along, strict=True):
                p -= step * v
        return value

    slope = sum(float((g * v).sum()) for g, v in zip(gradient, along, strict=True))
    assert (moved(1e-5) - moved(-1e-5)) / 2e-5 == pytest.approx(slope, rel=1e-6)


def test_each_is_computed_once_and_only_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    x, t = points()
    u = (x * t).sin()
    calls = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(a) or grad(*a, **k))
    d = sl.derivatives(u, at={"x": x, "t": t})
    assert calls == []
    _ = d.x, d.t, d.x
    assert len(calls) == 1
    _ = d.xx, d.xt, d.tx
    assert len(calls) == 2
    _ = d.tt
    assert len(calls) == 3


def test_a_relu_net_has_no_second_derivative_and_that_is_a_fault():
    net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
    x, t = points()
    u = net(torch.cat([x, t], 1))
    d = sl.derivatives(u, at={"x": x, "t": t})
    assert bool(d.x.any())
    with pytest.raises(sl.FaultError, match="SL445") as caught:
        _ = d.xx
    assert "`u_xx` is exactly 0 at all 5 points" in caught.value.fault.what
    assert "test_derivatives.py" in caught.value.fault.where
    quiet = sl.derivatives(u, at={"x": x, "t": t}, may_vanish=True)
    assert not bool(quiet.xx.any())


def test_a_linear_function_has_zeros_where_they_are_allowed():
    x, t = points()
    d = sl.derivatives(2 * x + 3 * t, at={"x": x, "t": t}, may_vanish=True)
    assert torch.equal(d.x, torch.full_like(x, 2.0))
    assert torch.equal(d.xt, torch.zeros_like(x))
    assert torch.equal(d.xxt, torch.zeros_like(x))
    layer = nn.Linear(2, 1)
    of_net = sl.derivatives(layer(torch.cat([x, t], 1)), at=(x, t), may_vanish=True)
    assert torch.equal(of_net[0, 0], torch.zeros_like(x))


def test_a_coordinate_that_does_not_require_grad_is_a_fault():
    x, t = points()
    fixed = t.detach()
    with pytest.raises(sl.FaultError, match="SL446") as caught:
        sl.derivatives(x * fixed, at={"x": x, "t": fixed})
    assert caught.value.fault.what == "`t` does not require grad"


def test_a_coordinate_that_u_does_not_depend_on_is_a_fault():
    x, t = points()
    d = sl.derivatives(x * t.detach(), at={"x": x, "t": t})
    with pytest.raises(sl.FaultError, match="u does not depend on `t`"):
        _ = d.x


def test_an_output_without_a_graph_is_a_fault():
    x, t = points()
    with torch.no_grad():
        u = x * t
    with pytest.raises(sl.FaultError, match="u has no graph"):
        sl.derivatives(u, at=(x, t))


@pytest.mark.parametrize(("u", "x"), [((5, 2), (5, 1)), ((5, 1), (5, 2)), ((5, 1), (4, 1)), ((), (5,))])
def test_other_shapes_are_refused(u: tuple[int, ...], x: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"must be \[N\] or \[N, 1\]"):
        sl.derivatives(torch.zeros(u), at=(torch.zeros(x),))


def test_unknown_coordinates_are_refused():
    x, t = points()
    d = sl.derivatives(x * t, at={"x": x, "t": t})
    with pytest.raises(KeyError, match="no coordinate 'y'"):
        _ = d["y"]
    with pytest.raises(KeyError, match="no coordinate 2"):
        _ = d[2]
    with pytest.raises(AttributeError, match="coordinates are x, t"):
        _ = d.xy
    with pytest.raises(ValueError, match="names no coordinate"):
        sl.derivatives(x * t, at=())
