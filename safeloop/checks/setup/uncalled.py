"""A `backward` that nobody calls: written in a module, where autograd does not look for it."""

from __future__ import annotations

import inspect
import linecache
import re
from collections.abc import Iterator

from torch import nn

from safeloop.checks.check import Check
from safeloop.checks.source import where_defined
from safeloop.checks.views import SetupView
from safeloop.faults import Fault

_GRADIENT = re.compile(r"^(grad|d_?(out|y|z)|delta|gy$|g$|upstream)", re.IGNORECASE)
"""What the argument of a derivative is called."""
_CALLED = re.compile(r"\.backward\(\s*(?!\)|retain_graph|create_graph|inputs|gradient)")
"""A call with an argument of its own: perhaps by hand."""


class BackwardOfModule(Check):
    """A module defines `backward`, which autograd never calls.

    ## What it does
    Looks for modules of classes of your own with a method `backward` whose last argument is named like a gradient, and
    that does not itself call `backward`. Where some line of the same file calls a `backward` with an argument, by hand
    perhaps, nothing is said.

    ## Why it is bad
    Autograd differentiates the operations of `forward` one by one, and asks only `torch.autograd.Function` for a
    derivative of its own. A gradient reversal or a straight-through estimator that is written as a module is the
    identity, or the plain operation, in the backward pass: nothing is reversed, and nothing says so.

    ## Bad
    ```python
    class Reversal(nn.Module):
        def forward(self, x):
            return x

        def backward(self, grad_output):
            return -grad_output

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    model = nn.Sequential(nn.Linear(4, 4), Reversal(), nn.Linear(4, 1))
    Run(model=model, data=[torch.randn(8, 4)], optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 2}).fit()
    ```
    ## Good
    ```python
    class Reverse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad_output):
            return -grad_output

    class Reversal(nn.Module):
        def forward(self, x):
            return Reverse.apply(x)

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    model = nn.Sequential(nn.Linear(4, 4), Reversal(), nn.Linear(4, 1))
    Run(model=model, data=[torch.randn(8, 4)], optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 2}).fit()
    ```
    ## Fix
    Write it as a `torch.autograd.Function` with static `forward` and `backward`, and call its `apply` in the module's
    forward; or register a full backward hook.

    ## Source
    https://github.com/hash2430/pitchtron/issues/3; https://pytorch.org/docs/stable/notes/extending.html.
    """

    code = "SL221"
    title = "backward of a module"
    severity = "warning"

    @classmethod
    def find(cls, view: SetupView) -> Iterator[Fault]:
        """One fault a class."""
        told: set[type] = set()
        for name, module in view.model.named_modules():
            kind = type(module)
            if kind in told or not _is_derivative(kind):
                continue
            told.add(kind)
            yield cls.fault(
                f"`{name}` ({kind.__name__}) defines `backward`, which autograd never calls",
                where=where_defined(inspect.getattr_static(kind, "backward")),
                why="only a torch.autograd.Function has a derivative of its own: of a module, autograd differentiates "
                "what its forward does",
                fix=f"write it as a torch.autograd.Function, and call its `apply` in {kind.__name__}.forward",
                names=(name,),
            )


def _is_derivative(kind: type[nn.Module]) -> bool:
    """Whether a class has a `backward` that looks as if autograd were to call it."""
    method = inspect.getattr_static(kind, "backward", None)
    method = getattr(method, "__func__", method)
    if not inspect.isfunction(method) or str(method.__module__).startswith("torch."):
        return False
    arguments = list(inspect.signature(method).parameters)
    if len(arguments) != 2 or not _GRADIENT.match(arguments[1]):
        return False
    code = method.__code__
    return "backward" not in code.co_names and not _CALLED.search("".join(linecache.getlines(code.co_filename)))
