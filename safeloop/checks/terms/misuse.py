"""Losses that are computed, and are not what was meant: broadcasts, probabilities taken for logits."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck
from safeloop.checks.source import at
from safeloop.faults import Fault

_PAIRS = frozenset(
    [
        "sub",
        "__sub__",
        "subtract",
        "rsub",
        "__rsub__",
        "mul",
        "__mul__",
        "add",
        "__add__",
        "mse_loss",
        "l1_loss",
        "smooth_l1_loss",
        "huber_loss",
        "binary_cross_entropy",
        "binary_cross_entropy_with_logits",
        "poisson_nll_loss",
        "kl_div",
    ]
)
_LOSSES = frozenset(name for name in _PAIRS if "loss" in name or "entropy" in name or name == "kl_div")


class BroadcastInLoss(CallCheck):
    """Predictions [N, 1] and targets [N] are combined element by element, which gives [N, N].

    ## Source
    https://github.com/deepset-ai/FARM/issues/229.
    """

    code = "SL420"
    title = "prediction and target broadcast"
    severity = "warning"
    hears = _PAIRS

    def __init__(self) -> None:
        self._told: set[str] = set()

    def hear(self, call: Call) -> Iterator[Fault]:
        """Where one of two tensors depends on parameters, the other does not, and the result is an outer product."""
        operands = [t for t in call.args[:2] if isinstance(t, Tensor)]
        if len(operands) != 2:
            return
        a, b = operands
        if not _is_outer(a, b) or bool(call.tape.live(a)) == bool(call.tape.live(b)):
            return
        is_loss = call.name in _LOSSES
        place = at(call.site, "the loss")
        if place in self._told or (not is_loss and call.name not in ("sub", "__sub__", "subtract", "rsub", "__rsub__")):
            return
        self._told.add(place)
        size = max(a.shape[-1], b.shape[-1])
        yield self.fault(
            f"`{call.name.strip('_')}` of {list(a.shape)} and {list(b.shape)} broadcast to [{size}, {size}]: every "
            "prediction is compared with every target",
            where=place,
            why="one of the two lacks a dimension; the loss goes down all the same, towards the mean of the targets",
            fix="bring both to one shape: `pred.squeeze(-1)` or `target.unsqueeze(-1)`",
            severity="error" if is_loss else "warning",
        )


def _is_outer(a: Tensor, b: Tensor) -> bool:
    """Whether [..., N, 1] meets [..., N] (or the other way round), N > 1, so that N x N pairs come out."""
    low, high = sorted((a, b), key=lambda t: t.dim())
    if high.dim() != low.dim() + 1 or not low.dim():
        return False
    return high.shape[-1] == 1 and low.shape[-1] > 1 and tuple(high.shape[:-1]) == tuple(low.shape)


class ProbabilitiesAsLogits(CallCheck):
    """A loss that takes logits is given probabilities, or one that takes log-probabilities is given others.

    ## Source
    https://github.com/Lightning-Universe/lightning-bolts/issues/654; documentation of `torch.nn.CrossEntropyLoss`.
    """

    code = "SL421"
    title = "loss of probabilities instead of logits"
    severity = "warning"
    hears = frozenset(("cross_entropy", "nll_loss", "binary_cross_entropy_with_logits"))

    def __init__(self) -> None:
        self._told: set[str] = set()

    def hear(self, call: Call) -> Iterator[Fault]:
        """Where the input of the loss was made by softmax or sigmoid, or holds what only they make."""
        scores = call.args[0] if call.args else call.kwargs.get("input")
        if not isinstance(scores, Tensor):
            return
        maker = call.tape.maker(scores)
        found = _wrong(call.name, maker, scores)
        place = at(call.site, "the loss")
        if found and place not in self._told:
            self._told.add(place)
            what, why, fix = found
            yield self.fault(what, where=place, why=why, fix=fix)


def _wrong(loss: str, maker: str, scores: Tensor) -> tuple[str, str, str] | None:
    if loss == "cross_entropy" and (maker == "softmax" or (maker != "log_softmax" and _are_probabilities(scores))):
        return (
            f"the input of cross_entropy {list(scores.shape)} is already a softmax: its rows sum to 1",
            "cross_entropy applies log_softmax itself: of probabilities it is nearly flat, learning is slow, and the loss "
            "cannot come near 0",
            "give cross_entropy the scores from before the softmax",
        )
    if loss == "binary_cross_entropy_with_logits" and maker == "sigmoid":
        return (
            "the input of binary_cross_entropy_with_logits is already a sigmoid",
            "the sigmoid is applied a second time: every prediction lies between 0.5 and 0.73",
            "give it the scores from before the sigmoid, or use binary_cross_entropy",
        )
    if loss == "nll_loss" and (maker == "softmax" or _are_probabilities(scores)):
        return (
            f"the input of nll_loss {list(scores.shape)} holds probabilities, not their logarithms",
            "nll_loss only picks the entry of the target: the loss is the mean probability, without a logarithm",
            "use log_softmax in place of softmax, or cross_entropy on the scores",
        )
    return None


def _are_probabilities(scores: Tensor) -> bool:
    """Whether all rows lie in [0, 1] and sum to 1, which scores do not by chance."""
    if scores.dim() < 2 or scores.shape[1] < 2 or not scores.is_floating_point() or not scores.numel():
        return False
    sums = scores.detach().float().sum(1)
    return bool(scores.min() >= 0) and bool(((sums - 1).abs() < 1e-3).all())
