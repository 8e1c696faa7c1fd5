"""Loss terms that are a part of other loss terms of the same step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from safeloop.checks.check import Check
from safeloop.checks.terms.reading import read_terms, where
from safeloop.checks.views import TermsView
from safeloop.checks.wording import listed
from safeloop.faults import Fault

_SUMS = ("Add", "Sub", "Neg", "Sum", "Mean", "Stack", "Cat", "View", "Reshape", "Unsqueeze", "Squeeze", "Expand")
_FACTORS = ("Mul", "Div")
_MOST = 200


class TermContainsAnother(Check):
    """A loss term is the sum of other terms that are returned beside it, so that they count twice.

    ## What it does
    Walks the graph of every term through sums and constant factors alone, and looks for the node that made another
    returned term of a weight that is not 0. Terms that each declare what they train are left alone. Cost: about 2 us
    for each node, a few for each term.

    ## Why it is bad
    All returned terms are added up. A total that is returned beside its parts doubles their gradients, as if the
    learning rate or a weight were twice what is written, and shifts the balance with what is not in the total.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def losses(self, batch):
            out = self.model(batch)
            fit, size = F.mse_loss(out, batch), out.square().mean()
            return {"fit": fit, "size": size, "total": fit + 0.1 * size}

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 4), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def losses(self, batch):
            out = self.model(batch)
            fit, size = F.mse_loss(out, batch), out.square().mean()
            return {"fit": fit, "size": 0.1 * size}

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 4), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Return the parts alone: their weighted sum is logged as the loss. Weights belong in `losses.NAME.weight`.

    ## Source
    Seen where a loss function of a plain loop, which returns a total and its parts for the log, was taken over.
    """

    code = "SL426"
    title = "loss term counted twice"
    severity = "warning"

    @classmethod
    def find(cls, view: TermsView) -> Iterator[Fault]:
        """One fault for each term that others are a part of."""
        terms = {t.name: t.tensor for t in read_terms(view) if view.weights.get(t.name, 1.0) and t.tensor.requires_grad}
        for name, tensor in terms.items():
            others = {n: t for n, t in terms.items() if n != name and not (n in view.trains and name in view.trains)}
            parts = [n for n, t in others.items() if _edge(t) in _summed(tensor, {_edge(t) for t in others.values()})]
            if parts:
                yield cls.fault(
                    f"loss term `{name}` is a sum that contains {listed(parts)}, returned beside it",
                    where=where(view, name),
                    why="all returned terms are added up, so that the gradients of the parts count twice",
                    fix=f"leave `{name}` out: the weighted sum of the terms is the loss, and is logged",
                    names=(name, *parts),
                )


def _edge(tensor: Tensor) -> tuple[Any, int]:
    return tensor.grad_fn, tensor.output_nr


def _summed(tensor: Tensor, wanted: set[tuple[Any, int]]) -> set[tuple[Any, int]]:
    """Those of some nodes that a term is a sum of; a term that is one of them, or a multiple of one, is not."""
    found: set[tuple[Any, int]] = set()
    waiting: list[Any] = [tensor.grad_fn]
    seen: set[Any] = set()
    is_sum = False
    while waiting and len(seen) < _MOST:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        ways = [edge for edge in node.next_functions if edge[0] is not None]
        kind = node.name().partition("Backward")[0]
        if kind in _SUMS or (kind in _FACTORS and len(ways) == 1):
            found |= wanted & set(ways)
            is_sum = is_sum or len(ways) > 1
            waiting += [following for following, _ in ways]
    return found if is_sum else set()
