"""Custom functions whose backward is wrong."""

from __future__ import annotations

from typing import Any

from safeloop.autograd.functions import check_function
from safeloop.checks.check import Check
from safeloop.checks.source import where_defined
from safeloop.faults import Fault


class CustomGradientWrong(Check):
    """The backward of a custom `torch.autograd.Function` is not the derivative of its forward.

    ## What it does
    Compares the two at the arguments of the first call of each class, in float64, along one random direction. Nothing
    is said of a backward that differs on purpose: of the identity (gradient reversal), of a forward with flat parts or
    jumps (straight-through estimators, quantisers, surrogate gradients), or of a backward that is not linear (clipped
    gradients). Cost: about twenty calls, once for each class.

    ## Why it is bad
    Training runs, and follows a direction that is not the gradient. A missing factor looks like a wrong learning rate,
    a backward that does not use the incoming gradient like noise.

    ## Bad
    ```python
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, grad_output):
            (x,) = ctx.saved_tensors
            return grad_output * x**2

    class Run(sl.Trainer):
        def loss(self, batch):
            return Cube.apply(self.model(batch)).square().mean()

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, grad_output):
            (x,) = ctx.saved_tensors
            return grad_output * 3 * x**2

    class Run(sl.Trainer):
        def loss(self, batch):
            return Cube.apply(self.model(batch)).square().mean()

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Return the incoming gradient times the derivative of the forward, one for each argument, in their order.
    `torch.autograd.gradcheck` compares every entry. Where the backward is meant to differ, accept the code for the
    class by name: `audit.accept: {SL313: [NAME]}`.

    ## Source
    https://github.com/pytorch/pytorch/issues/76185; documentation of `torch.autograd.gradcheck`.
    """

    code = "SL313"
    title = "wrong gradient of a custom function"
    severity = "warning"

    @classmethod
    def of(cls, kind: type, args: tuple[Any, ...]) -> Fault | None:
        """The fault of a function at the arguments of its first call; None where nothing is wrong."""
        found = check_function(kind, args)
        if found is None:
            return None
        name = kind.__name__
        ignores = found.ignores_gradient
        return cls.fault(
            f"the backward of {name} gives {found.analytic:.4g} along a random direction, central differences of its "
            f"forward give {found.numeric:.4g}",
            where=where_defined(kind.backward) if hasattr(kind, "backward") else name,
            why=f"{name}.backward returns a gradient although the incoming one is zero: it does not use it"
            if ignores
            else f"{name}.backward does not return the incoming gradient times the derivative of forward",
            fix="multiply the local derivative by the gradient that comes in (`return grad_output * ...`)"
            if ignores
            else "correct the formula; torch.autograd.gradcheck compares the two in float64",
            names=(name,),
        )
