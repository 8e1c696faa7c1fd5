"""Displaced weights and unrolled steps against closed forms and loops by hand; float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import safeloop as sl
from safeloop.autograd import adapt, displaced


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_displaced_moves_by_the_radius_along_the_gradient_and_back_bit_for_bit():
    torch.manual_seed(0)
    a, b, without = (torch.randn(3, requires_grad=True) for _ in range(3))
    (a.square().sum() + b.sin().sum()).backward()
    before = [t.detach().clone() for t in (a, b, without)]
    gradient = torch.cat([a.grad, b.grad])
    with displaced([a, b, without], 0.3):
        moved = torch.cat([a.detach() - before[0], b.detach() - before[1]])
        assert float(moved.norm()) == pytest.approx(0.3)
        torch.testing.assert_close(moved / 0.3, gradient / gradient.norm())
        assert torch.equal(without, before[2])
        a.grad = None
    assert all(map(torch.equal, (a, b, without), before))


def test_displaced_puts_back_after_an_exception_and_after_a_nan():
    w = torch.ones(2, requires_grad=True)
    w.grad = torch.tensor([math.nan, 1.0])
    with pytest.raises(RuntimeError, match="inside"), displaced([w], 0.1):
        assert not bool(w.isfinite().all())
        raise RuntimeError("inside")
    assert torch.equal(w, torch.ones(2))


def test_displaced_stays_where_there_is_no_gradient():
    w = torch.ones(2, requires_grad=True)
    with displaced([w], 0.1):
        assert torch.equal(w, torch.ones(2))
    w.grad = torch.zeros(2)
    with displaced([w], 0.1):
        assert torch.equal(w, torch.ones(2))


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_the_meta_gradient_of_a_parabola_is_its_closed_form(steps: int):
    a, c, lr, w0 = 0.7, 2.0, 0.3, 5.0
    w = torch.tensor(w0, requires_grad=True)
    adapted = adapt(lambda now: 0.5 * a * (now["w"] - c) ** 2, {"w": w}, steps=steps, lr=lr)["w"]
    factor = (1 - lr * a) ** steps
    assert float(adapted.detach()) == pytest.approx(c + factor * (w0 - c))
    (meta,) = torch.autograd.grad(0.5 * a * (adapted - c) ** 2, w)
    assert float(meta) == pytest.approx(a * factor**2 * (w0 - c))
    assert w.grad is None
    assert float(w.detach()) == w0


def test_first_order_takes_the_gradient_at_the_end():
    a, c, lr, w0 = 0.7, 2.0, 0.3, 5.0
    w = torch.tensor(w0, requires_grad=True)
    now = adapt(lambda p: 0.5 * a * (p["w"] - c) ** 2, {"w": w}, steps=3, lr=lr, first_order=True)["w"]
    (meta,) = torch.autograd.grad(0.5 * a * (now - c) ** 2, w)
    assert float(meta) == pytest.approx(a * (1 - lr * a) ** 3 * (w0 - c))


def test_the_meta_gradient_is_the_central_difference():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    x, y, qx, qy = torch.randn(5, 2), torch.randn(5, 1), torch.randn(5, 2), torch.randn(5, 1)

    def meta(values: dict[str, Tensor]) -> Tensor:
        def error(now: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
            return (torch.func.functional_call(net, now, (inputs,)) - targets).square().mean()

        return error(adapt(lambda now: error(now, x, y), values, steps=2, lr=0.1), qx, qy)

    named = dict(net.named_parameters())
    found = torch.cat([g.reshape(-1) for g in torch.autograd.grad(meta(named), list(named.values()))])
    along = {name: torch.randn_like(p) for name, p in named.items()}
    h = 1e-5
    up, down = (meta({n: (p + s * along[n]).detach() for n, p in named.items()}).detach() for s in (h, -h))
    slope = found @ torch.cat([v.reshape(-1) for v in along.values()])
    assert float(((up - down) / (2 * h) - slope).abs() / slope.abs()) <= 1e-6


class SharpRun(sl.Trainer):
    def custom_step(self, ops, batch):
        def terms():
            return {"fit": (self.model(batch[0]) - batch[1]).square().mean()}

        ops.zero()
        ops.backward(terms())
        with displaced(list(self.model.parameters()), 0.05):
            ops.zero()
            ops.backward(terms())
        ops.update()


def pairs(number: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(6, 3), torch.randn(6, 1)) for _ in range(number)]


def sharp(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> SharpRun:
    sgd = {"type": "SGD", "lr": 0.1, "momentum": 0.9, "fused": False}
    run = {"max_steps": len(data), "device": "cpu"}
    return SharpRun(model=model, data=data, optimizers=sgd, run=run, log={"sinks": []})


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def test_sam_is_a_loop_by_hand():
    model, by_hand, data = net(), net(), pairs(5)
    sharp(model, data).fit()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9)
    for x, y in data:
        here = torch.autograd.grad((by_hand(x) - y).square().mean(), list(by_hand.parameters()))
        norm = torch.stack([g.norm() for g in here]).norm()
        old = [p.detach().clone() for p in by_hand.parameters()]
        with torch.no_grad():
            for p, g in zip(by_hand.parameters(), here, strict=True):
                p += 0.05 * g / norm
        optimizer.zero_grad()
        (by_hand(x) - y).square().mean().backward()
        with torch.no_grad():
            for p, values in zip(by_hand.parameters(), old, strict=True):
                p.copy_(values)
        optimizer.step()
    for found, expected in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_sam_updates_nothing_where_a_gradient_is_not_finite():
    model, data = net(), pairs(1)
    data[0][0][0, 0] = math.inf
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(sl.FaultError, match="SL501"):
        sharp(model, data).fit()
    assert all(map(torch.equal, model.parameters(), before))
