"""Loss terms whose values cannot be differentiated or used: Python numbers, counts, NaN and infinity."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator

from safeloop.checks.check import Check
from safeloop.checks.terms.reading import read_terms, where
from safeloop.checks.views import GradientsView, TermsView
from safeloop.faults import Fault


class TermIsAPythonNumber(Check):
    """A loss term is a Python number, which has no gradient.

    ## What it does
    Looks at the type of every returned term, and quotes the lines of the loss function that make it.

    ## Why it is bad
    `min(0, y)` and `max(0, y)` return the 0 itself on the batches where it wins, `.item()` and `float()` a copy of
    the value. In a plain loop this ends in "'int' object has no attribute 'backward'", and only on those batches.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            y = self.model(batch).square().mean()
            return min(0, y)

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            y = self.model(batch).square().mean()
            return torch.clamp(y, max=0)

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Fix
    `torch.clamp(y, max=0)` for `min(0, y)`, `torch.clamp(y, min=0)` or `F.relu(y)` for `max(0, y)`, `torch.minimum` and
    `torch.maximum` for two tensors. Leave out `.item()` and `float()`. A sum over no items at all is
    `self.model(batch).sum() * 0`, so that the graph stays.

    ## Source
    https://github.com/Lightning-AI/pytorch-lightning/issues/7405.
    """

    code = "SL402"
    title = "loss term is a Python number"

    @classmethod
    def find(cls, view: TermsView) -> Iterator[Fault]:
        """One fault for each such term."""
        for name, term in view.terms.items():
            if isinstance(term, numbers.Number):
                yield cls.fault(
                    f"loss term `{name}` is the Python {type(term).__name__} {_shown(term)}, not a tensor",
                    where=where(view, name),
                    why="a Python number has no gradient; `min`, `max`, `sum` of nothing, `.item()` and `float()` "
                    "return one, some of them only on some batches",
                    fix="keep it a tensor: `torch.clamp(y, max=0)` for `min(0, y)`, `torch.clamp(y, min=0)` for "
                    "`max(0, y)`, `torch.minimum` for two tensors, no `.item()` and no `float()`",
                    names=(name,),
                )


class TermIsNotFloatingPoint(Check):
    """A loss term is an integer, a boolean or a complex tensor, which has no gradient that could train anything.

    ## What it does
    Looks at the dtype of every returned tensor.

    ## Why it is bad
    Integers and booleans come from counting, comparing and `argmax`: steps, whose derivative is zero or undefined, so
    that torch keeps no graph. A complex number cannot be minimised.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return (self.model(batch).argmax(1) != 0).sum()

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 3), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return 1 - self.model(batch).softmax(1)[:, 0].mean()

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 3), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Use a smooth stand-in: probabilities in place of `argmax`, cross-entropy in place of an error count. The count
    itself belongs in `metrics`. Of a complex value, return `.abs()` or `.real`.

    ## Source
    https://github.com/wonbeomjang/mobile-hair-segmentation-pytorch/issues/3; `torch.Tensor.requires_grad`.
    """

    code = "SL406"
    title = "loss term is not floating point"

    @classmethod
    def find(cls, view: TermsView) -> Iterator[Fault]:
        """One fault for each such term."""
        for term in read_terms(view):
            if term.tensor.dtype.is_floating_point:
                continue
            kind = str(term.tensor.dtype).removeprefix("torch.")
            is_complex = term.tensor.dtype.is_complex
            yield cls.fault(
                f"loss term `{term.name}` is a tensor of dtype {kind}",
                where=where(view, term.name),
                why="a complex number cannot be minimised"
                if is_complex
                else "counts, comparisons and `argmax` give integers or booleans, through which no gradient flows",
                fix="return its `.abs()`, or its `.real` part"
                if is_complex
                else "use a smooth stand-in, such as probabilities or a cross-entropy; what is only to be looked at "
                "belongs in `metrics`",
                names=(term.name,),
            )


class TermIsNotFinite(Check):
    """The value of a loss term is NaN or infinite.

    ## What it does
    Reads the value of every term before the update. Cost: one read of a 0-d tensor each, only where something is not
    finite. A Trainer then runs the step again, bitwise, and names the operation that gave the first NaN or infinity,
    or the part of the batch, the parameter or the buffer that held it before. In a loop that is not ours, on steps that
    are looked at in depth, the result of every call is looked at instead, and the line is told at the update.

    ## Why it is bad
    The gradients of such a term are NaN, and one update with them ruins every parameter that it reaches, for good.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            each = self.model(batch).square()
            return each[each < 0].mean()

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            each = self.model(batch).square()
            mask = each < 0
            return (each * mask).sum() / mask.sum().clamp(min=1)

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Look for the mean of an empty selection, a division by zero, `log` or `sqrt` of what may be zero or negative, an
    `exp` that overflows, a batch that holds NaN. `nonfinite: {policy: skip, max_consecutive: 3}` leaves such updates
    out, and ends the run when they come in a row.

    ## Source
    safeloop's own rule; documentation of `torch.isfinite`.
    """

    code = "SL405"
    title = "loss term is not finite"

    @classmethod
    def find(cls, view: GradientsView) -> Iterator[Fault]:
        """One fault for each such term."""
        values = {name: float(value.detach()) for name, value in view.terms.items()}
        finite = [f"`{name}` = {value:.4g}" for name, value in values.items() if math.isfinite(value)]
        for name, value in values.items():
            if not math.isfinite(value):
                yield cls.fault(
                    f"loss term `{name}` is {value}" + (f"; finite: {', '.join(finite)}" if finite else ""),
                    where=view.where,
                    why="its value is made in the forward pass: an operation of the loss or the model, or the "
                    "batch, gave it",
                    fix="look for the mean of an empty selection, division by zero, `log` or `sqrt` of what may be "
                    "zero, an `exp` that overflows, a batch that holds NaN; `nonfinite.policy: skip` leaves such "
                    "updates out",
                    names=(name,),
                )


def _shown(number: object) -> str:
    return f"{number:.6g}" if isinstance(number, float) else str(number)
