"""Custom functions that are differentiated twice, and are right only once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from safeloop.autograd.functions import Disagreement, check_twice
from safeloop.autograd.numbers import number_of
from safeloop.autograd.second import functions_between
from safeloop.autograd.sites import Site
from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck
from safeloop.checks.graph.functions import place_of
from safeloop.checks.source import at
from safeloop.faults import Fault

_KEPT = 200
"""Gradients that no backward pass has visited."""


class SecondDerivativeOfFunctionWrong(CallCheck):
    """A penalty differentiates the backward of a custom `torch.autograd.Function`, a part of which has no graph.

    ## What it does
    Notes which classes a `torch.autograd.grad(..., create_graph=True)` runs through, and where a loss contains its
    result, compares the double backward with central differences of the backward, in float64, along random
    directions. Nothing is said of classes whose first derivative is no derivative of their forward, on purpose or not,
    nor of those marked `@once_differentiable`. Cost: about ten calls, once for each class.

    ## Why it is bad
    A tensor that `forward` computes and keeps on `ctx` has no graph, so that double backward takes it for a constant.
    The penalty has the right value, and its gradient lacks the terms that belong to the second derivative.

    ## Bad
    ```python
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.slope = 2 * x
            return x**2

        @staticmethod
        def backward(ctx, grad_output):
            return grad_output * ctx.slope

    class Run(sl.Trainer):
        def loss(self, batch):
            x = batch.clone().requires_grad_()
            score = Square.apply(self.model(x)).sum()
            (slope,) = torch.autograd.grad(score, x, create_graph=True)
            return slope.square().sum(1).mean()

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 4), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx, grad_output):
            (x,) = ctx.saved_tensors
            return grad_output * 2 * x

    class Run(sl.Trainer):
        def loss(self, batch):
            x = batch.clone().requires_grad_()
            score = Square.apply(self.model(x)).sum()
            (slope,) = torch.autograd.grad(score, x, create_graph=True)
            return slope.square().sum(1).mean()

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 4), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Save inputs or outputs with `ctx.save_for_backward`, and compute from them in `backward`, with grad mode left on.
    `torch.autograd.gradgradcheck` compares every entry. A class that is only meant to be differentiated once should
    say so with `@once_differentiable`.

    ## Source
    https://github.com/pytorch/pytorch/issues/58509; https://github.com/pytorch/pytorch/issues/104040.
    """

    code = "SL319"
    title = "wrong second derivative of a custom function"
    severity = "warning"
    hears = frozenset(("grad",))

    def __init__(self) -> None:
        self._known: set[type] = set()
        self._differentiated: dict[int, tuple[set[type], Site | None]] = {}
        """the node of a gradient with a graph -> the functions that it ran through, and the line"""

    def hear(self, call: Call) -> Iterator[Fault]:
        """Note gradients with a graph, and the custom functions that they ran through."""
        if call.tape.functions and call.kwargs.get("create_graph") and len(call.args) > 1:
            outputs, inputs = (list(_tensors(given)) for given in call.args[:2])
            kinds = functions_between(outputs, inputs) - self._known
            for tensor in _tensors(call.out) if kinds else ():
                if tensor.grad_fn is not None:
                    self._differentiated[number_of(tensor.grad_fn)] = (kinds, call.site)
        return iter(())

    def visited(self, numbers: frozenset[int] | set[int], functions: Mapping[type, tuple[Any, ...]]) -> Iterator[Fault]:
        """The faults of a loss whose graph visits these nodes, after these functions were called with arguments."""
        for number in [n for n in self._differentiated if n in numbers]:
            kinds, site = self._differentiated.pop(number)
            for kind in sorted(kinds & functions.keys() - self._known, key=lambda k: k.__name__):
                self._known.add(kind)
                found = check_twice(kind, functions[kind])
                if found is not None:
                    yield self._of(kind, found, site)
        if len(self._differentiated) > _KEPT:
            self._differentiated.clear()

    def _of(self, kind: type, found: Disagreement, site: Site | None) -> Fault:
        name = kind.__name__
        return self.fault(
            f"the derivative of {name}.backward is {found.analytic:.4g} along random directions, central differences "
            f"give {found.numeric:.4g}: the loss differentiates {name} twice",
            where=f"{place_of(kind)}; differentiated with a graph at {at(site, 'torch.autograd.grad')}",
            why="a tensor that forward computes and keeps has no graph, nor has what backward computes under no_grad: "
            "double backward takes it for a constant",
            fix="save inputs or outputs with ctx.save_for_backward and compute the derivative from them in backward; "
            "torch.autograd.gradgradcheck compares the two",
            names=(name,),
        )


def _tensors(given: Any) -> Iterator[Tensor]:
    for value in (given,) if isinstance(given, Tensor) else given if isinstance(given, (tuple, list)) else ():
        if isinstance(value, Tensor):
            yield value
