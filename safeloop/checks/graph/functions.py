"""Custom functions whose backward is wrong."""

from __future__ import annotations

from typing import Any

from safeloop.autograd.functions import check_function
from safeloop.checks.check import Check
from safeloop.checks.source import where_defined
from safeloop.faults import Fault


class CustomGradientWrong(Check):
    """The backward of a custom `torch.autograd.Function` is not the derivative of its forward.

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
