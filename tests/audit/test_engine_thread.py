"""Autograd's engine in a thread of its own, as it runs on an accelerator, brought about on the CPU.

Hooks then have no frame of the user's above them, and the nodes of a graph that a backward pass makes bear the numbers
of another thread: a node of this moment looks like one from long ago.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import get_ident
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, overrides
from torch.autograd import Variable
from torch.utils import _python_dispatch

import safeloop as sl
from safeloop.autograd import numbers
from safeloop.autograd.numbers import next_number, number_of, renumbered

Terms = Callable[[nn.Module, Tensor], Tensor]


class Elsewhere:
    """An engine that runs in one other thread, with the modes of the thread that calls."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._ident = self._worker.submit(get_ident).result()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def run_backward(self, *args: Any, **kwargs: Any) -> Any:
        if get_ident() == self._ident:  # a pass inside a pass
            return self._engine.run_backward(*args, **kwargs)
        functions = overrides._get_current_function_mode_stack()
        dispatches = _python_dispatch._get_current_dispatch_mode_stack()

        def enter() -> None:
            for mode in functions:
                overrides._push_mode(mode)
            for mode in dispatches:
                _python_dispatch._push_mode(mode)

        def leave() -> None:
            for _ in functions:
                overrides._pop_mode()
            for _ in dispatches:
                _python_dispatch._pop_mode()

        self._worker.submit(enter).result()
        try:
            return self._worker.submit(self._engine.run_backward, *args, **kwargs).result()
        finally:
            self._worker.submit(leave).result()

    def close(self) -> None:
        self._worker.shutdown()


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    engine = Elsewhere(Variable._execution_engine)
    monkeypatch.setattr(Variable, "_execution_engine", engine)
    monkeypatch.setattr(numbers, "runs_elsewhere", lambda tensor: True)
    torch.manual_seed(0)
    for _ in range(50):  # the loop's thread has made nodes before
        torch.ones(1, requires_grad=True).exp()
    yield
    engine.close()


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def by_hand(model: nn.Module, x: Tensor) -> Tensor:
    x.requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return model(x).square().mean() + (slope.norm(2, 1) - 1).square().mean()


def second_derivative(model: nn.Module, x: Tensor) -> Tensor:
    x.requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    return F.mse_loss(model(x), x[:, :1].detach()) + bend.square().mean()


def adapted(model: nn.Module, x: Tensor) -> Tensor:
    weights = dict(model.named_parameters())
    slopes = torch.autograd.grad(model(x).square().mean(), list(weights.values()), create_graph=True)
    fast = {name: w - 0.1 * slope for (name, w), slope in zip(weights.items(), slopes, strict=True)}
    return (torch.func.functional_call(model, fast, x) - 1).square().mean()


def into_leaves(model: nn.Module, x: Tensor) -> Tensor:
    model(x).square().mean().backward(create_graph=True)
    slopes = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return model(x).square().mean() + sum((slope.square().sum() for slope in slopes), torch.zeros(()))


def watched(loss_of: Terms, steps: int = 8, level: str = "standard") -> tuple[nn.Module, list[sl.Fault]]:
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect", level=level) as audit:
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of(model, torch.randn(16, 4)).backward()
            optimizer.step()
            audit.step()
    return model, list(audit.faults)


SECOND_ORDER: list[Terms] = [by_hand, second_derivative, adapted]


@pytest.mark.parametrize("loss_of", SECOND_ORDER)
def test_a_graph_made_by_a_pass_of_this_iteration_is_not_taken_for_an_old_one(loss_of: Terms) -> None:
    model, faults = watched(loss_of)
    assert faults == []
    bare, _ = watched(loss_of, level="off")
    assert all(map(torch.equal, model.parameters(), bare.parameters())), "torch's own numbers order the engine's work"


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_neither_is_one_that_hangs_on_gradients() -> None:
    assert "SL310" not in {fault.code for fault in watched(into_leaves)[1]}


def test_what_is_avoided_does_happen_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "runs_elsewhere", lambda tensor: False)
    assert "SL310" in {fault.code for fault in watched(by_hand)[1]}


def test_a_state_that_is_carried_over_is_still_told() -> None:
    state = [torch.zeros(16, 8)]

    def carried(model: nn.Module, x: Tensor) -> Tensor:
        state[0] = torch.tanh(model[0](x) + 0.5 * state[0])
        return by_hand(model, x) + model[2](state[0]).square().mean()

    def run(model: nn.Module, x: Tensor) -> Tensor:
        loss = carried(model, x)
        loss.backward(retain_graph=True)
        return loss

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(5):
            optimizer.zero_grad()
            try:
                run(model, torch.randn(16, 4))
            except RuntimeError:
                break
            optimizer.step()
            audit.step()
    assert "SL310" in {fault.code for fault in audit.faults}


class Penalised(sl.Trainer):
    def losses(self, batch: Tensor) -> dict[str, Any]:
        return {"fit": (self.model(batch) - 1).square().mean(), "gp": self.penalty(self.model, at=batch)}


@pytest.mark.parametrize("kind", ["gradient", "hessian_trace"])
def test_a_penalty_of_the_trainer_is_no_fault_and_watching_changes_no_bit(kind: str) -> None:
    runs = []
    for level in ("standard", "off"):
        torch.manual_seed(0)
        run = Penalised(
            model=mlp(),
            data=[torch.randn(16, 4) for _ in range(4)],
            optimizers={"type": "Adam", "lr": 1e-3},
            penalties={"gp": {"type": kind}},
            run={"max_steps": 10, "device": "cpu", "seed": 3},
            audit={"level": level},
            log={"sinks": []},
        )
        assert run.fit().faults == ()
        runs.append(run.model)
    assert all(map(torch.equal, runs[0].parameters(), runs[1].parameters()))


def test_numbers_follow_the_order_in_which_nodes_were_made() -> None:
    model, x = mlp(), torch.randn(16, 4, requires_grad=True)
    values = model(x).sum()
    with renumbered([values]) as made:
        made += torch.autograd.grad(values, x, create_graph=True)
    later = made[0].square().sum()
    assert made[0].grad_fn is not None
    assert number_of(values.grad_fn) < number_of(made[0].grad_fn) < number_of(later.grad_fn) < next_number()
    with renumbered([later]) as again:
        again += torch.autograd.grad(later, x, create_graph=True)
    assert number_of(later.grad_fn) < number_of(again[0].grad_fn) < next_number()
    own = [node for node, _ in again[0].grad_fn.next_functions if node is not None and node.next_functions]
    assert all(number_of(node) < number_of(again[0].grad_fn) for node in own)
