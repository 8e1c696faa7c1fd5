"""Losses that are computed, and are not what was meant: broadcasts, probabilities taken for logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from safeloop.autograd.lineage import Mark
from safeloop.autograd.sites import Site
from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck
from safeloop.checks.source import at
from safeloop.faults import Fault

_DIFFERENCES = frozenset(["sub", "__sub__", "subtract", "rsub", "__rsub__"])
_PRODUCTS = frozenset(["mul", "__mul__", "__rmul__", "multiply"])
_SUMS = frozenset(["mean", "sum"])
_LOSSES = frozenset(
    (
        *("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "poisson_nll_loss"),
        *("binary_cross_entropy_with_logits", "kl_div"),
    )
)


class BroadcastInLoss(CallCheck):
    """Predictions [N, 1] and targets [N] are combined element by element, which gives [N, N].

    ## What it does
    Looks at the shapes of subtractions, products and of losses of `torch.nn.functional` on the steps that are looked
    at in depth. A fault is told where one operand depends on trained parameters, the other does not, and they differ by
    one last dimension of size 1. A mere subtraction or product is a warning, and is told only where its result is
    summed over both dimensions; a call of a loss is an error. Cost: none beyond the tape of calls.

    ## Why it is bad
    Every prediction is compared with every target, or every log-probability weighted by every advantage. The loss goes
    down all the same, towards predicting the mean of the batch, and nothing else is learned. torch warns of it in
    `F.mse_loss` and its like, not in `(a - b).square().mean()`.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return (self.model(batch) - batch.sum(1)).square().mean()

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return (self.model(batch).squeeze(-1) - batch.sum(1)).square().mean()

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Bring both to one shape: `prediction.squeeze(-1)` or `target.unsqueeze(-1)`. Where all pairs are meant, index both
    (`a[:, None] - b[None]`), which says so and is not told.

    ## Source
    https://github.com/deepset-ai/FARM/issues/229.
    """

    code = "SL420"
    title = "prediction and target broadcast"
    severity = "warning"
    hears = _DIFFERENCES | _PRODUCTS | _SUMS | _LOSSES

    def __init__(self) -> None:
        self._told: set[str] = set()
        self._pairs: set[Site | None] = set()
        """lines that have taken all pairs of a column and a row"""

    def hear(self, call: Call) -> Iterator[Fault]:
        """Note differences that are outer products; tell those that are summed over both dimensions, and losses."""
        if call.name in _SUMS:
            yield from self._summed(call)
            return
        operands = _operands(call)
        if operands is None or not isinstance(call.out, Tensor):
            return
        a, b = operands
        if a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0] == 1 < min(len(a), b.shape[1]):
            self._pairs.add(call.site)
        shape = _outer(a, b)
        if shape is None or bool(call.tape.live(a)) == bool(call.tape.live(b)) or _is_meant(call, a, b):
            return
        if call.site in self._pairs or (call.name in _PRODUCTS and _is_a_layer(call, a, b)):
            return
        what = f"`{call.name.strip('_')}` of {list(a.shape)} and {list(b.shape)} broadcast to {shape}"
        if call.name in _LOSSES and call.kwargs.get("reduction") != "none":
            yield from self._tell(at(call.site, "the loss"), what, "error")
        else:
            call.tape.mark(call.out, Mark("outer", what, str(shape), call.site, call.tape.module, 0))

    def _summed(self, call: Call) -> Iterator[Fault]:
        value = call.args[0] if call.args else None
        if not isinstance(value, Tensor) or len(call.args) > 1 or call.kwargs.get("dim") is not None:
            return
        for mark in call.tape.marks_of(value):
            if mark.kind == "outer" and mark.reason == str(list(value.shape)):
                yield from self._tell(at(mark.site, "the loss"), mark.name, "warning")

    def _tell(self, place: str, what: str, severity: Any) -> Iterator[Fault]:
        if place not in self._told:
            self._told.add(place)
            yield self.fault(
                f"{what}: every prediction meets every target or weight",
                where=place,
                why="one of the two lacks a dimension; the loss goes down all the same, towards the mean of the "
                "targets",
                fix="bring both to one shape: `pred.squeeze(-1)` or `target.unsqueeze(-1)`",
                severity=severity,
            )


def _operands(call: Call) -> tuple[Tensor, Tensor] | None:
    given = list(call.args[:2]) + [call.kwargs[key] for key in ("input", "other", "target") if key in call.kwargs]
    tensors = [t for t in given if isinstance(t, Tensor)]
    return (tensors[0], tensors[1]) if len(tensors) == 2 else None


def _outer(a: Tensor, b: Tensor) -> list[int] | None:
    """The shape of all pairs where N values meet N others that lie along another dimension, as [N, 1] and [N] do."""
    if a.numel() != b.numel() or a.numel() < 2 or a.dim() == b.dim() or not a.dim() or not b.dim():
        return None
    if [n for n in a.shape if n > 1] != [n for n in b.shape if n > 1]:
        return None
    low, high = sorted((list(a.shape), list(b.shape)), key=len)
    padded = [1] * (len(high) - len(low)) + low
    shape = [max(pair) for pair in zip(padded, high, strict=True)]
    return None if padded == high or shape in (padded, high) else shape


def _is_meant(call: Call, a: Tensor, b: Tensor) -> bool:
    """Whether the prediction was given a dimension by indexing with None just before: all pairs are wanted."""
    prediction = a if call.tape.live(a) else b
    return prediction.dim() > min(a.dim(), b.dim()) and call.tape.maker(prediction) in ("__getitem__", "unsqueeze")


def _is_a_layer(call: Call, a: Tensor, b: Tensor) -> bool:
    """Whether a product is a hand-written layer, of a parameter itself, or was asked for by indexing with None."""
    return any((t.is_leaf and call.tape.live(t)) or _is_unsqueezed(call, t) for t in (a, b))


def _is_unsqueezed(call: Call, tensor: Tensor) -> bool:
    base = tensor._base
    return call.tape.maker(tensor) in ("__getitem__", "unsqueeze") or (base is not None and base.dim() < tensor.dim())


_SHAPED = (
    *("View", "UnsafeView", "Reshape", "ReshapeAlias", "Squeeze", "Unsqueeze", "Transpose", "T", "Permute", "Select"),
    *("Slice", "Clone", "ToCopy", "Expand", "Index", "IndexSelect", "Movedim", "Alias", "Contiguous"),
)
"""Nodes that hand on values as they are."""
_SCORES = ("Addmm", "Mm", "Bmm", "Convolution", "Linear", "MkldnnLinear", "Baddbmm")


class ProbabilitiesAsLogits(CallCheck):
    """A loss that takes logits is given probabilities, or one that takes log-probabilities is given others.

    ## What it does
    Looks at what made the first argument of `cross_entropy`, `nll_loss` and `binary_cross_entropy_with_logits`: a
    softmax or a sigmoid. For a softmax that was written by hand, rows that lie in [0, 1] and sum to 1 tell it. Cost: a
    sum over the scores on the steps that are looked at in depth.

    ## Why it is bad
    The loss applies the softmax a second time. Of values in [0, 1] it is nearly flat: gradients are small, learning is
    slow, and the loss cannot come near 0. `nll_loss` of probabilities has no logarithm at all, and falls below 0.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return F.cross_entropy(self.model(batch).softmax(1), torch.zeros(8).long())

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 3), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return F.cross_entropy(self.model(batch), torch.zeros(8).long())

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 3), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Give `cross_entropy` and `binary_cross_entropy_with_logits` the scores from before the softmax or sigmoid, and
    `nll_loss` the result of `log_softmax`. Apply softmax or sigmoid where probabilities are shown.

    ## Source
    https://github.com/Lightning-Universe/lightning-bolts/issues/654; documentation of `torch.nn.CrossEntropyLoss`.
    """

    code = "SL421"
    title = "loss of probabilities instead of logits"
    severity = "warning"
    hears = frozenset(("cross_entropy", "nll_loss", "binary_cross_entropy_with_logits", "kl_div"))

    def __init__(self) -> None:
        self._told: set[str] = set()

    def hear(self, call: Call) -> Iterator[Fault]:
        """Where the input of the loss was made by softmax or sigmoid, or holds what only they make."""
        scores = call.args[0] if call.args else call.kwargs.get("input")
        if not isinstance(scores, Tensor) or not scores.requires_grad:
            return
        place = at(call.site, "the loss")
        if place not in self._told and (found := _wrong(call.name, _made_by(scores), scores)):
            self._told.add(place)
            what, why, fix = found
            yield self.fault(what, where=place, why=why, fix=fix)


def _made_by(scores: Tensor) -> str:
    """The node that computed these values, before they were moved, sliced and reshaped."""
    node: Any = scores.grad_fn
    while node is not None and node.name().partition("Backward")[0] in _SHAPED:
        node = node.next_functions[0][0]
    return "" if node is None else str(node.name().partition("Backward")[0])


def _wrong(loss: str, made_by: str, scores: Tensor) -> tuple[str, str, str] | None:
    shape = list(scores.shape)
    if loss == "cross_entropy" and (made_by == "Softmax" or (made_by != "LogSoftmax" and _are_probabilities(scores))):
        return (
            f"the input of cross_entropy {shape} is already a softmax: its rows sum to 1",
            "cross_entropy applies log_softmax itself: of probabilities it is nearly flat, learning is slow, and the "
            "loss cannot come near 0",
            "give cross_entropy the scores from before the softmax",
        )
    if loss == "binary_cross_entropy_with_logits" and made_by in ("Sigmoid", "Softmax"):
        return (
            f"the input of binary_cross_entropy_with_logits {shape} is already a {made_by.lower()}",
            "the sigmoid is applied a second time: every prediction lies between 0.5 and 0.73",
            f"give it the scores from before the {made_by.lower()}, or use binary_cross_entropy",
        )
    if loss == "kl_div" and made_by == "Softmax":
        return (
            f"the input of kl_div {shape} holds probabilities, not their logarithms",
            "kl_div takes log-probabilities as its first argument: of probabilities it is no divergence",
            "use log_softmax in place of softmax for the first argument",
        )
    if loss == "nll_loss" and (made_by == "Softmax" or made_by in _SCORES or _are_probabilities(scores)):
        holds = "scores" if made_by in _SCORES else "probabilities"
        return (
            f"the input of nll_loss {shape} holds {holds}, not logarithms of probabilities",
            "nll_loss only picks the entry of the target: "
            + ("the loss falls without bound" if holds == "scores" else "the loss is the mean probability"),
            "use log_softmax before it, or cross_entropy on the scores",
        )
    return None


def _are_probabilities(scores: Tensor) -> bool:
    """Whether all rows lie in [0, 1] and sum to 1, which scores do not by chance."""
    if scores.dim() < 2 or scores.shape[1] < 2 or not scores.is_floating_point() or not scores.numel():
        return False
    sums = scores.detach().float().sum(1)
    return bool(scores.min() >= 0) and bool(((sums - 1).abs() < 1e-3).all())
