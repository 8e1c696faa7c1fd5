"""Loss terms that are no tensor, or a tensor of the wrong shape."""

from __future__ import annotations

import numbers
from collections.abc import Iterator

from torch import Tensor

from safeloop.checks.check import Check
from safeloop.checks.terms.reading import read_terms, where
from safeloop.checks.views import TermsView
from safeloop.checks.wording import counted
from safeloop.faults import Fault


class TermIsNotATensor(Check):
    """A loss function returned something that is no tensor: None, a list, a numpy array.

    ## What it does
    Looks at the type of every returned term. A term is a 0-d tensor, or `(tensor, weights)`. Python numbers are SL402.

    ## Why it is bad
    Only a tensor carries a graph back to the parameters. None most often means a branch of the function without
    `return`.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            value = self.model(batch).square().mean()

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Return a tensor on every path of the function. A list of terms becomes one by `sum(terms)` or
    `torch.stack(terms).mean()`; a numpy array has left autograd: do the same with torch functions.

    ## Source
    safeloop's own rule.
    """

    code = "SL401"
    title = "loss term is not a tensor"

    @classmethod
    def find(cls, view: TermsView) -> Iterator[Fault]:
        """One fault for each such term, or one where nothing was returned at all."""
        if not (view.terms or view.declared or view.constants_allowed):
            yield cls.fault(
                "the loss function returned no term", where=view.source, fix="return at least one loss term"
            )
        read = {term.name for term in read_terms(view)}
        for name, term in view.terms.items():
            if name not in read and not isinstance(term, numbers.Number):
                yield cls.fault(
                    f"loss term `{name}` is {_described(term)}",
                    where=where(view, name),
                    why="a path of the function ends without `return`"
                    if term is None
                    else "only a tensor carries a graph",
                    fix=_remedy(term),
                    names=(name,),
                )


class TermIsNotScalar(Check):
    """A loss term has more than one value and no weights that say how to sum them.

    ## What it does
    Looks at the number of dimensions of every returned tensor. A term is 0-d, or comes as `(tensor, weights)`.

    ## Why it is bad
    A gradient belongs to one number. torch refuses to differentiate several ("grad can be implicitly created only for
    scalar outputs"); whether they are to be summed or averaged changes the learning rate by the batch size, so nobody
    should guess.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return F.mse_loss(self.model(batch), batch, reduction="none")

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 4), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            each = F.mse_loss(self.model(batch), batch, reduction="none")
            return each, torch.full_like(each, 1 / each.numel())

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 4), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Reduce it, by `.mean()` or `.sum()`, or return `(tensor, weights)` with weights of the same shape: their gradient
    is that of `(tensor * weights).sum()`.

    ## Source
    Documentation of `torch.autograd.backward` (`grad_tensors`).
    """

    code = "SL403"
    title = "loss term is not a scalar"

    @classmethod
    def find(cls, view: TermsView) -> Iterator[Fault]:
        """One fault for each such term of floating-point type."""
        for term in read_terms(view):
            if term.is_weighted or term.tensor.dim() == 0 or not term.tensor.dtype.is_floating_point:
                continue
            shape, count = list(term.tensor.shape), term.tensor.numel()
            shown = tuple(shape) if len(shape) == 1 else shape
            yield cls.fault(
                f"loss term `{term.name}` has shape {shown} ({counted(count, 'value')}), not a scalar",
                where=where(view, term.name),
                why="a gradient belongs to one number: how several are to be summed must be said",
                fix="return `.squeeze()` of it"
                if count == 1
                else "reduce it by `.mean()` (or `.sum()`), or return `(tensor, weights)` with weights of shape "
                f"{shown}",
                names=(term.name,),
            )


class TermWeightsOfWrongShape(Check):
    """The weights of a term `(tensor, weights)` do not have the tensor's shape.

    ## What it does
    Compares the two shapes. They are never broadcast.

    ## Why it is bad
    Weights of shape [8] on a term of shape [8, 1] would broadcast to [8, 8]: 64 values where 8 are meant.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            each = self.model(batch).square()
            return each, torch.full((8,), 1 / 8)

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            each = self.model(batch).square().squeeze(1)
            return each, torch.full((8,), 1 / 8)

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Give both the same shape, by `squeeze`, `reshape` or `expand_as`.

    ## Source
    Documentation of `torch.autograd.backward` (`grad_tensors`).
    """

    code = "SL408"
    title = "weights of a loss term have the wrong shape"

    @classmethod
    def find(cls, view: TermsView) -> Iterator[Fault]:
        """One fault for each such term."""
        for term in read_terms(view):
            if not term.is_weighted:
                continue
            is_tensor = isinstance(term.weights, Tensor)
            if not is_tensor or term.weights.shape != term.tensor.shape:
                shape = list(term.tensor.shape)
                found = f"have shape {list(term.weights.shape)}" if is_tensor else f"are {_described(term.weights)}"
                yield cls.fault(
                    f"loss term `{term.name}` has shape {shape}, its weights {found}",
                    where=where(view, term.name),
                    why="weights are never broadcast: that would change how many values are summed",
                    fix=f"give the weights of `{term.name}` as a tensor of shape {shape}",
                    names=(term.name,),
                )


def _described(value: object) -> str:
    if value is None:
        return "None"
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    size = f" of length {len(value)}" if isinstance(value, list | tuple | dict | set | str) else ""
    return f"a {kind}{size}"


def _remedy(value: object) -> str:
    if value is None:
        return "return the loss on every path of the function"
    if isinstance(value, tuple):
        return "return a 0-d tensor, or `(tensor, weights)`, two tensors of one shape; several terms are a dict"
    if isinstance(value, list | dict):
        return (
            "return one 0-d tensor, such as `torch.stack(terms).mean()`; several terms are a flat dict, from `losses`"
        )
    return "compute the term with torch functions and return a 0-d tensor"
