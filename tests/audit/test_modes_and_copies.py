"""Modes that are left, evaluations that train, targets that are trained, derivatives without a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.2), nn.Linear(6, 1))


def codes(audit: Any) -> list[tuple[str, str]]:
    return [(fault.code, fault.severity) for fault in audit.faults]


@pytest.mark.parametrize("is_restored", [False, True])
def test_grad_mode_that_an_iteration_leaves_off(watched: Any, is_restored: bool) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    try:
        with watched(model, optimizer) as audit:
            for step in range(8):
                loss = model(torch.randn(5, 4)).square().mean()
                if loss.requires_grad:
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                if step == 3:
                    torch.set_grad_enabled(False)  # here
                    torch.set_grad_enabled(is_restored)
                audit.step()
    finally:
        torch.set_grad_enabled(True)
    assert codes(audit) == ([] if is_restored else [("SL707", "error")])
    assert is_restored or "# here" in audit.faults[0].where


@pytest.mark.parametrize("is_evaluated", [False, True])
def test_eval_mode_since_an_evaluation_before_the_first_step(watched: Any, is_evaluated: bool) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    with watched(model, optimizer) as audit:
        model.eval()  # on purpose, where nothing is evaluated
        if is_evaluated:
            with torch.no_grad():
                model(torch.randn(5, 4))
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.randn(5, 4)).square().mean().backward()
            optimizer.step()
            audit.step()
    assert codes(audit) == ([("SL703", "warning")] if is_evaluated else [])


def loop_with_evaluation(watched: Any, evaluate: Callable[[nn.Module, Any], None]) -> Any:
    model = net()
    optimizer = Adam(model.parameters(), lr=0.01)
    with watched(model, optimizer) as audit:
        for step in range(12):
            model.train()
            model(torch.randn(5, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 4 == 3:
                model.eval()
                evaluate(model, optimizer)
            audit.step()
    return audit


def test_an_evaluation_that_leaves_gradients(watched: Any) -> None:
    def evaluate(model: nn.Module, optimizer: Any) -> None:
        model(torch.randn(5, 4)).square().mean().backward()

    audit = loop_with_evaluation(watched, evaluate)
    assert codes(audit) == [("SL708", "error")]
    assert ".evaluate: `" in audit.faults[0].where


def test_an_evaluation_that_steps(watched: Any) -> None:
    def evaluate(model: nn.Module, optimizer: Any) -> None:
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    assert codes(loop_with_evaluation(watched, evaluate)) == [("SL708", "warning")]


def test_an_attack_in_eval_mode_whose_gradients_are_zeroed_is_sound(watched: Any) -> None:
    def evaluate(model: nn.Module, optimizer: Any) -> None:
        x = torch.randn(5, 4, requires_grad=True)
        model(x).square().mean().backward()
        assert x.grad is not None
        optimizer.zero_grad()

    assert codes(loop_with_evaluation(watched, evaluate)) == []


def update_by_state(net: nn.Module, target: nn.Module) -> None:
    target.load_state_dict(net.state_dict())


def update_by_average(net: nn.Module, target: nn.Module) -> None:
    for p, q in zip(net.parameters(), target.parameters(), strict=True):
        q.data.copy_(0.9 * q.data + 0.1 * p.data)


def update_in_place(net: nn.Module, target: nn.Module) -> None:
    with torch.no_grad():
        for p, q in zip(net.parameters(), target.parameters(), strict=True):
            q.lerp_(p, 0.1)


@pytest.mark.parametrize("update", [update_by_state, update_by_average, update_in_place])
@pytest.mark.parametrize("is_trained", [True, False])
def test_a_target_that_its_own_optimizer_trains(watched: Any, update: Any, is_trained: bool) -> None:
    torch.manual_seed(0)
    q, target = nn.Linear(4, 3), nn.Linear(4, 3)
    held = [*q.parameters(), *target.parameters()] if is_trained else [*q.parameters()]
    target.requires_grad_(is_trained)
    optimizer = SGD(held, lr=0.01)
    with watched({"q": q, "target": target}, optimizer) as audit:
        for _ in range(8):
            optimizer.zero_grad()
            F.mse_loss(q(torch.randn(5, 4)), target(torch.randn(5, 4))).backward()
            optimizer.step()
            update(q, target)
            audit.step()
    assert codes(audit) == ([("SL662", "error")] if is_trained else [])
    assert not is_trained or ("`target.weight`" in audit.faults[0].what and "`q.weight`" in audit.faults[0].what)


def test_fast_weights_with_an_optimizer_of_their_own_are_sound(watched: Any) -> None:
    torch.manual_seed(0)
    slow, fast = nn.Linear(4, 3), nn.Linear(4, 3)
    inner, outer = SGD(fast.parameters(), lr=0.1), SGD(slow.parameters(), lr=0.5)
    with watched({"slow": slow, "fast": fast}, {"inner": inner, "outer": outer}) as audit:
        for _ in range(8):
            fast.load_state_dict(slow.state_dict())
            for _ in range(2):
                inner.zero_grad()
                fast(torch.randn(5, 4)).square().mean().backward()
                inner.step()
            for p, q in zip(slow.parameters(), fast.parameters(), strict=True):
                p.grad = p.detach() - q.detach()
            outer.step()
            audit.step()
    assert "SL662" not in {fault.code for fault in audit.faults}


def test_a_discriminator_before_one_of_two_generators(watched: Any) -> None:
    torch.manual_seed(0)
    there, back, disc = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)
    g, d = Adam([*there.parameters(), *back.parameters()], lr=0.01), Adam(disc.parameters(), lr=0.01)
    with watched({"there": there, "back": back, "disc": disc}, {"g": g, "d": d}) as audit:
        for _ in range(6):
            x = torch.randn(5, 4)
            g.zero_grad()
            d.zero_grad()
            fake = there(x)
            (F.softplus(-disc(fake)).mean() + F.l1_loss(back(fake), x)).backward()
            g.step()
            (F.softplus(disc(fake.detach())) + F.softplus(-disc(x))).mean().backward()
            d.step()
            audit.step()
    (fault,) = audit.faults
    assert fault.code == "SL633"
    assert "`zero_grad()` of `d`" in fault.fix
    assert "detach" not in fault.fix


def test_graphs_that_an_object_of_the_users_keeps(watched: Any) -> None:
    class History:
        def __init__(self) -> None:
            self.curve: list[Tensor] = []

    model, history = net(), History()
    optimizer = SGD(model.parameters(), lr=0.01)
    with watched(model, optimizer) as audit:
        for _ in range(12):
            optimizer.zero_grad()
            loss = model(torch.randn(5, 4)).square().mean()
            loss.backward()
            optimizer.step()
            history.curve.append(loss)
            audit.step()
    assert [(fault.code, "`history.curve`" in fault.what) for fault in audit.faults] == [("SL311", True)]


def heat(watched: Any, activation: nn.Module, *, create: bool = True, is_weight: bool = False) -> Any:
    """A heat equation solved by a net, with derivatives by hand."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), activation, nn.Linear(8, 1))
    optimizer = Adam(model.parameters(), lr=0.01)
    with watched(model, optimizer) as audit:
        for _ in range(6):
            x, t = torch.rand(9, 1, requires_grad=True), torch.rand(9, 1, requires_grad=True)
            u = model(torch.cat([x, t], 1))
            ones = torch.ones_like(u)
            u_t, u_x = torch.autograd.grad(u, (t, x), ones, create_graph=True)
            (u_xx,) = torch.autograd.grad(u_x, x, ones, create_graph=create, retain_graph=True)
            rest = u_t - 0.1 * u_xx
            loss = (rest.detach().abs() * u.square()).mean() if is_weight else rest.square().mean()
            optimizer.zero_grad()
            (loss + u.square().mean()).backward()
            optimizer.step()
            audit.step()
    return audit


def test_a_second_derivative_without_a_graph(watched: Any) -> None:
    audit = heat(watched, nn.Tanh(), create=False)
    assert codes(audit) == [("SL422", "error")]
    assert "create_graph=create" in audit.faults[0].where


def test_a_residual_that_is_a_weight_needs_no_graph(watched: Any) -> None:
    assert codes(heat(watched, nn.Tanh(), create=False, is_weight=True)) == []


def test_a_second_derivative_of_a_net_in_pieces(watched: Any) -> None:
    assert ("SL445", "warning") in codes(heat(watched, nn.ReLU()))
    assert codes(heat(watched, nn.SiLU())) == []


def test_a_bias_that_a_difference_cancels_is_no_dead_one(watched: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = Adam(model.parameters(), lr=0.01)
    with watched(model, optimizer) as audit:
        for _ in range(8):
            same = torch.zeros(5)
            d = (model(torch.randn(5, 4)) - model(torch.randn(5, 4))).square().sum(1)
            optimizer.zero_grad()
            (same * d + (1 - same) * F.relu(9 - d)).mean().backward()
            optimizer.step()
            audit.step()
    assert codes(audit) == []
