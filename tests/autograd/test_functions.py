"""Backwards that are no derivatives are found; those that differ on purpose are left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from safeloop.autograd.functions import check_function

X = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
W = torch.randn(5, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
B = torch.randn(5, generator=torch.Generator().manual_seed(2), requires_grad=True)
POSITIVE = (X.detach().abs() + 0.5).requires_grad_()


def make(forward: Callable[..., Any], backward: Callable[..., Any]) -> Any:
    """A function whose backward is given the arguments after the incoming gradient."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            ctx.args = args
            return forward(*args)

        @staticmethod
        def backward(ctx: Any, *g: Tensor) -> Any:
            return backward(*g, *ctx.args)

    return Function


def sigmoid_slope(x: Tensor) -> Tensor:
    return x.sigmoid() * (1 - x.sigmoid())


WRONG = {
    "wrong sign": (lambda x: (-x).exp(), lambda g, x: g * (-x).exp(), [X]),
    "missing factor": (lambda x: x**3, lambda g, x: g * x**2, [X]),
    "missing chain rule": (lambda x: (2 * x).sin(), lambda g, x: g * (2 * x).cos(), [X]),
    "incoming gradient not used": (lambda x: x.tanh(), lambda g, x: 1 - x.tanh() ** 2, [X]),
    "result in place of the derivative": (lambda x: x.sigmoid(), lambda g, x: g * x.sigmoid(), [X]),
    "derivative of the argument only": (lambda x: x * x.sigmoid(), lambda g, x: g * sigmoid_slope(x), [X]),
    "arguments in the wrong order": (
        lambda x, y: x * y.exp(),
        lambda g, x, y: (g * x * y.exp(), g * y.exp()),
        [X, POSITIVE],
    ),
    "one of two is wrong": (lambda x, w: x @ w, lambda g, x, w: (g @ w, x.t() @ g), [X, W]),
    "one does not require grad and stays in float64 too": (
        lambda x, w, scale: scale * (x @ w),
        lambda g, x, w, scale: (None, x.t() @ g, None),
        [X.detach(), W, 0.3],
    ),
    "mean as a sum": (lambda x: x.square().mean(), lambda g, x: g * 2 * x, [X]),
    "sum over the batch forgotten factor": (lambda x, b: x * b, lambda g, x, b: (g * b, g.sum(0)), [X, B]),
    "softmax without its cross terms": (
        lambda x: x.softmax(1),
        lambda g, x: g * x.softmax(1) * (1 - x.softmax(1)),
        [X],
    ),
    "norm without the norm": (lambda x: x.norm(dim=1), lambda g, x: g[:, None] * x, [X]),
    "layer norm as a scaling": (
        lambda x: (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True),
        lambda g, x: g / x.std(1, keepdim=True),
        [X],
    ),
    "a leaky relu of the wrong slope": (
        lambda x: torch.where(x > 0, x, 0.1 * x),
        lambda g, x: g * torch.where(x > 0, 1.0, 0.2),
        [X],
    ),
    "sign of a relu": (lambda x: x.clamp(min=0), lambda g, x: -g * (x > 0), [X]),
    "square root": (lambda x: x.sqrt(), lambda g, x: g / x.sqrt(), [POSITIVE]),
    "logarithm": (lambda x: x.log(), lambda g, x: g * x, [POSITIVE]),
    "first of two results": (lambda x: (x.exp(), x.sin()), lambda g, h, x: g + h * x.cos(), [X]),
}

RIGHT = {
    "exp": (lambda x: x.exp(), lambda g, x: g * x.exp(), [X]),
    "matmul": (lambda x, w: x @ w, lambda g, x, w: (g @ w.t(), x.t() @ g), [X, W]),
    "logarithm": (lambda x: x.log(), lambda g, x: g / x, [POSITIVE]),
    "relu": (lambda x: x.clamp(min=0), lambda g, x: g * (x > 0), [X]),
    "identity of another shape": (lambda x: x.flatten(), lambda g, x: -g.view_as(x), [X]),
    "scaled straight-through": (lambda x: x.sign() * x.abs().mean(), lambda g, x: g * (x.abs() < 1), [X]),
    "ternary": (lambda x: torch.where(x.abs() > 0.5, x.sign(), 0.0) * x.abs().mean(), lambda g, x: g, [X]),
    "rounded to a grid with an offset": (lambda x: (x * 4).round() / 4 + 0.01 * x, lambda g, x: g, [X]),
    "clamp": (lambda x: x.clamp(-0.3, 0.3), lambda g, x: g, [X]),
    "top k of a row": (lambda x: torch.where(x >= x.topk(2).values[:, 1:], x, 0.0), lambda g, x: g, [X]),
    "surrogate": (lambda x: (x > 0).to(x.dtype), lambda g, x: g / (1 + x.square()), [X]),
    "heaviside": (lambda x: torch.heaviside(x, x.new_zeros(())), lambda g, x: g * sigmoid_slope(x), [X]),
    "clipped": (lambda x: 3 * x, lambda g, x: (3 * g).clamp(-0.1, 0.1), [X]),
    "normalised": (lambda x: 3 * x, lambda g, x: g / (g.norm() + 1e-9), [X]),
    "only positive gradients": (lambda x: x.exp(), lambda g, x: g.clamp(min=0) * x.exp(), [X]),
    "penalty added": (lambda x: 2 * x, lambda g, x: 2 * g + 0.01 * x, [X]),
    "treated as a constant": (lambda x, b: x * b, lambda g, x, b: (g * b, None), [X, B]),
    "not smooth": (lambda x: (1e6 * x).sin(), lambda g, x: g, [X]),
    "outside its domain": (lambda x: x.sqrt(), lambda g, x: g, [X]),
    "integers": (lambda x: x.long(), lambda g, x: None, [X]),
    "cannot be called twice": (iter([X * 2.0]).__next__, lambda g: None, []),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_backward_is_found(name: str) -> None:
    forward, backward, args = WRONG[name]
    found = check_function(make(forward, backward), args)
    assert found is not None
    assert found.ignores_gradient == (name == "incoming gradient not used")


@pytest.mark.parametrize("name", RIGHT)
def test_a_backward_that_is_right_or_meant_is_left_alone(name: str) -> None:
    forward, backward, args = RIGHT[name]
    assert check_function(make(forward, backward), args) is None


def test_a_loss_that_is_right_for_a_gradient_of_one_is_told_apart() -> None:
    found = check_function(make(lambda x: x.square().mean(), lambda g, x: 2 * x / x.numel()), [X])
    assert found is not None
    assert found.only_at_other_than_one
    assert found.ignores_gradient
    wrong = check_function(make(lambda x: x.square().mean(), lambda g, x: 2 * x), [X])
    assert wrong is not None
    assert not wrong.only_at_other_than_one


def test_nothing_is_changed_by_the_check() -> None:
    running = torch.zeros(5)

    def forward(x: Tensor, mean: Tensor) -> Tensor:
        mean.lerp_(x.mean(0).to(mean.dtype), 0.1)
        return x.exp() * torch.rand(())

    before, seed = X.detach().clone(), torch.get_rng_state()
    check_function(make(forward, lambda g, x, mean: (g, None)), [X, running])
    assert torch.equal(X, before)
    assert torch.equal(torch.get_rng_state(), seed)
    assert not running.any()
    assert X.grad is None


def test_a_function_that_takes_a_module_or_a_callable_is_not_called() -> None:
    calls: list[Any] = []

    def forward(*args: Any) -> Tensor:
        calls.append(args)
        return X.detach().exp()

    kind = make(forward, lambda g, *args: g)
    for args in ([torch.nn.Linear(5, 1), X], [lambda x: x, X], [[X], X]):
        assert check_function(kind, args) is None
    assert not calls
    check_function(kind, [X, 1.0, "mean", None, (1, 2)])
    assert calls
