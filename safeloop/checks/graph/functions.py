"""Custom functions whose backward is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from safeloop.autograd.functions import Disagreement, check_function
from safeloop.autograd.numbers import number_of
from safeloop.autograd.sites import Site
from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck
from safeloop.checks.source import at, where_defined
from safeloop.faults import Fault

_PRODUCTS = frozenset(("mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply"))
_QUOTIENTS = frozenset(("div", "div_", "__truediv__", "__itruediv__", "true_divide", "divide"))
_SUMS = ("Add", "Sum", "Stack", "Cat", "View", "Unsqueeze", "Squeeze")
_MOST = 32
"""Nodes of a sum that are looked at."""
_KEPT = 200
"""Products that no backward pass has visited, as in an evaluation."""


class CustomGradientWrong(CallCheck):
    """The backward of a custom `torch.autograd.Function` is not the derivative of its forward.

    ## What it does
    Compares the two at the arguments of the first call of each class, in float64, along one random direction. Nothing
    is said of a backward that differs on purpose: of the identity (gradient reversal), of a forward with flat parts or
    jumps (straight-through estimators, quantisers, surrogate gradients), or of a backward that is not linear (clipped
    gradients). A loss that returns its gradient whatever comes in is right as long as nothing multiplies it: it is told
    once its value is scaled, by a weight, a mean over several, or the number of accumulated batches. Cost: about twenty
    calls, once for each class.

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

    hears = _PRODUCTS | _QUOTIENTS | {"mean"}

    def __init__(self) -> None:
        self._known: set[type] = set()
        self._right_at_one: dict[type, Disagreement] = {}
        """functions that ignore the incoming gradient, and are right where it is one"""
        self._scaled: dict[int, tuple[type, float, Site | None]] = {}
        """the node of a product -> the function whose result it scales, the factor, and the line"""

    def hear(self, call: Call) -> Iterator[Fault]:
        """Note where the scalar that a custom function gave, or a sum with it, is multiplied."""
        out = call.out
        if not isinstance(out, Tensor) or out.dim() or out.grad_fn is None:
            return iter(())
        factors = _factors(call)
        for (node, _), factor in zip(out.grad_fn.next_functions, factors, strict=False):
            kinds = _summed_functions(node) if factor is not None else ()
            value = float(factor) if kinds and factor is not None else 1.0
            self._scaled |= {number_of(out.grad_fn): (kind, value, call.site) for kind in kinds if value != 1}
        return iter(())

    def visited(self, numbers: frozenset[int] | set[int], functions: Mapping[type, tuple[Any, ...]]) -> Iterator[Fault]:
        """The faults of a loss whose graph visits these nodes, after these functions were called with arguments."""
        for kind, args in list(functions.items()):
            if kind in self._known:
                continue
            self._known.add(kind)
            found = check_function(kind, args)
            if found is not None and found.only_at_other_than_one:
                self._right_at_one[kind] = found
            elif found is not None:
                yield self._wrong(kind, found)
        for number in [n for n in self._scaled if n in numbers]:
            kind, factor, site = self._scaled.pop(number)
            if kind in self._right_at_one:
                yield self._scaled_in_vain(kind, self._right_at_one.pop(kind), factor, site)
        if len(self._scaled) > _KEPT:
            self._scaled.clear()

    def _wrong(self, kind: type, found: Disagreement) -> Fault:
        name = kind.__name__
        ignores = found.ignores_gradient
        return self.fault(
            f"the backward of {name} gives {found.analytic:.4g} along a random direction, central differences of its "
            f"forward give {found.numeric:.4g}",
            where=place_of(kind),
            why=f"{name}.backward returns a gradient although the incoming one is zero: it does not use it"
            if ignores
            else f"{name}.backward does not return the incoming gradient times the derivative of forward",
            fix=_USE_IT if ignores else "correct the formula; torch.autograd.gradcheck compares the two in float64",
            names=(name,),
        )

    def _scaled_in_vain(self, kind: type, found: Disagreement, factor: float, site: Site | None) -> Fault:
        name = kind.__name__
        return self.fault(
            f"the result of {name} is multiplied by {factor:.4g}, and its gradient is not: along a random direction it "
            f"is {found.analytic:.4g}, and should be {found.numeric * factor:.4g}",
            where=f"{place_of(kind)}; scaled at {at(site, 'the loss')}",
            why=f"{name}.backward returns the same gradient whatever comes in: a weight, a mean over batches or the "
            "factor of a gradient scaler has no effect on it",
            fix=_USE_IT,
            names=(name,),
        )


_USE_IT = "multiply the local derivative by the gradient that comes in (`return grad_output * ...`)"


def place_of(kind: type) -> str:
    """Where the backward of a custom function is defined."""
    backward = getattr(kind, "backward", None)
    return kind.__name__ if backward is None else where_defined(backward)


def _factors(call: Call) -> tuple[Any, ...]:
    """What the first and the second argument are multiplied by; None where that is no number."""
    if call.name == "mean":
        count = call.tensors[0].numel() if call.tensors else 0
        return (1 / count if count else None,)
    if len(call.args) < 2:
        return ()
    one, other = call.args[:2]
    if call.name in _QUOTIENTS:
        return (None if not _is_number(other) or float(other) == 0 else 1 / float(other),)
    return (other if _is_number(other) else None, one if _is_number(one) and one is not call.out else None)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)


def _summed_functions(node: Any) -> set[type]:
    """The custom functions whose results are added up in what a node has made."""
    found: set[type] = set()
    waiting, seen = [node], 0
    while waiting and seen < _MOST:
        node, seen = waiting.pop(), seen + 1
        kind = getattr(node, "_forward_cls", None)
        if kind is not None:
            found.add(kind)
        elif node is not None and node.name().startswith(_SUMS):
            waiting += [following for following, _ in node.next_functions]
    return found
