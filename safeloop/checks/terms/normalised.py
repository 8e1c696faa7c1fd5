"""Losses of log-probabilities that were normalised over another dimension than that of the classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from safeloop.autograd.numbers import number_of
from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck
from safeloop.checks.source import at
from safeloop.faults import Fault

_SHAPED = (
    *("View", "UnsafeView", "Reshape", "ReshapeAlias", "Squeeze", "Unsqueeze", "Transpose", "T", "Permute", "Clone"),
    *("ToCopy", "Movedim", "Alias", "Contiguous"),
)
"""Nodes that hand on all values as they are; those that choose some of them are not among them."""
_SAFE = ("Add", "Clamp")
"""What keeps a logarithm from zero."""
_FAR = 0.05
"""A sum over classes of `exp(0.05)` is no rounding error; half precision is allowed four times as much."""


class NormalisedOverAnother(CallCheck):
    """The log-probabilities that a loss is given are normalised over the batch, not over the classes.

    ## What it does
    Where the input of `nll_loss` or `kl_div` was made by a softmax, sums the probabilities over the classes on the
    steps that are looked at in depth. For `kl_div`, input and target must be normalised over the same dimension. A
    square of similarities whose diagonal is picked, as in contrastive losses, is right over either dimension. Cost: a
    sum over the scores.

    ## Why it is bad
    The samples of a batch compete for each class. The loss falls, a sample's prediction depends on its neighbours, and
    what is learned is which samples of a batch are most like a class. A wrong `dim` of a softmax raises no error where
    the shapes fit.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return F.nll_loss(F.log_softmax(self.model(batch), dim=0), torch.zeros(8).long())

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 3), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return F.nll_loss(F.log_softmax(self.model(batch), dim=1), torch.zeros(8).long())

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 3), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Give `log_softmax` the dimension of the classes: 1 for `nll_loss`, or -1 before the scores are flattened to rows.
    Or drop it and use `cross_entropy`.

    ## Source
    https://github.com/fxia22/pointnet.pytorch/issues/27.
    """

    code = "SL460"
    title = "probabilities normalised over another dimension"
    hears = frozenset(("nll_loss", "kl_div"))

    def __init__(self) -> None:
        self._told: set[str] = set()

    def hear(self, call: Call) -> Iterator[Fault]:
        """Where the input of the loss is normalised, and not over the dimension that the loss takes."""
        scores, target = (_argument(call, i, name) for i, name in enumerate(("input", "target")))
        place = at(call.site, "the loss")
        if not isinstance(scores, Tensor) or not isinstance(target, Tensor) or place in self._told:
            return
        node = _softmax_of(scores)
        if node is None or scores.dim() < 2 or not scores.numel():
            return
        wrong = _of_nll(scores, target) if call.name == "nll_loss" else _of_kl(call, scores, target)
        if wrong:
            self._told.add(place)
            origin = call.tape.origins.get(number_of(node))
            made = "" if origin is None else f"; normalised at {at(origin.site, 'a softmax')}"
            yield self.fault(
                f"the input of {call.name} {list(scores.shape)} is normalised over another dimension than {wrong}",
                where=place + made,
                why="the softmax was given another `dim`: samples or positions compete with each other in place of "
                "classes, so that a prediction depends on the rest of the batch",
                fix="give the softmax the dimension of the classes (`dim=1` for nll_loss, `dim=-1` before scores are "
                "flattened to rows), or use cross_entropy on the scores",
            )


def _argument(call: Call, place: int, name: str) -> Any:
    return call.args[place] if len(call.args) > place else call.kwargs.get(name)


def _softmax_of(scores: Tensor) -> Any:
    """The node of the softmax all of whose values these are, or the logarithms of them."""
    node: Any = scores.grad_fn
    is_log = False
    while node is not None:
        kind = node.name().partition("Backward")[0]
        if kind == ("Softmax" if is_log else "LogSoftmax"):
            return node
        ways = [following for following, _ in node.next_functions if following is not None]
        if len(ways) != 1 or kind not in (*_SHAPED, "Log", *(_SAFE if is_log else ())):
            return None
        is_log = is_log or kind == "Log"
        node = ways[0]
    return None


def _of_nll(scores: Tensor, target: Tensor) -> str:
    if _is_normalised(scores.detach(), 1) is not False or _is_diagonal(scores, target):
        return ""
    return f"the {scores.shape[1]} classes along `dim=1`: the probabilities of a row do not sum to 1"


def _of_kl(call: Call, scores: Tensor, target: Tensor) -> str:
    if scores.shape != target.shape or not target.is_floating_point():
        return ""
    aims = target.detach() if call.kwargs.get("log_target") else target.detach().log()
    ours = {d for d in range(scores.dim()) if _is_normalised(scores.detach(), d)}
    theirs = {d for d in range(scores.dim()) if _is_normalised(aims, d)}
    return f"that of its target, `dim={min(theirs)}`" if ours and theirs and not ours & theirs else ""


def _is_normalised(logs: Tensor, dim: int) -> bool | None:
    """Whether probabilities sum to 1 over a dimension everywhere; None where it is not clear."""
    far = logs.float().logsumexp(dim).abs()
    allowed = _FAR if torch.finfo(logs.dtype).eps < 1e-4 else 4 * _FAR
    if not bool(far.isfinite().all()):
        return None
    return bool(far.max() <= allowed) or (None if float(far.mean()) <= allowed else False)


def _is_diagonal(scores: Tensor, target: Tensor) -> bool:
    """Whether each row has the class after that of the row before: pairs of a contrastive loss."""
    if target.dim() != 1 or len(target) < 2 or scores.shape[1] < len(target):
        return False
    return bool((target.diff() == 1).all())
