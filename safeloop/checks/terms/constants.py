"""Parts of a loss that are constants: computed from decisions, or from a prediction that was detached."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from safeloop.autograd.lineage import Mark
from safeloop.autograd.numbers import number_of
from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck
from safeloop.checks.source import at
from safeloop.checks.wording import listed
from safeloop.faults import Fault

ADDS = frozenset(("add", "__add__", "__radd__", "add_", "__iadd__"))
_DETACHES = frozenset(("detach", ".data"))
_COMPARES = frozenset(("gt", "ge", "lt", "le", "__gt__", "__ge__", "__lt__", "__le__"))
_CHOICES = frozenset(("argmax", "argmin"))
_DECISIONS = _CHOICES | _COMPARES | {"eq", "ne", "__eq__", "__ne__"}
_NOISE = frozenset(("rand_like", "uniform_", "exponential_"))
_FACTORS = ("MulBackward0", "DivBackward0")
_LINEAR = ("AddBackward0", "SubBackward0", "NegBackward0", *_FACTORS)
_MOST = 256
"""Nodes of a sum that are looked at."""


class ConstantPartOfLoss(CallCheck):
    """A part of the loss depends on the model only through decisions, or through a prediction that was detached.

    ## What it does
    Follows what is added to the loss that is differentiated: a scalar without a graph, every path of which to the
    parameters ended in `argmax` or `argmin`, is an error; one whose paths
    ended in the `detach()` of an activation, a warning. A count that divides or multiplies, and a scalar that is
    detached itself, are not told. Cost: none beyond the tape of calls.

    ## Why it is bad
    The part is in the loss that is logged, and trains nothing. Where another part reaches the same parameters, no
    gradient is missing, so that nothing else shows it.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            scores = self.model(batch)
            wrong = (scores.argmax(1) != 0).float().mean()
            return scores.square().mean() + wrong

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 4), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            scores = self.model(batch)
            wrong = 1 - scores.softmax(1)[:, 0].mean()
            return scores.square().mean() + wrong

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 4), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Compute the part from probabilities (`softmax`, `sigmoid`) in place of decisions, and without `detach()`. What is
    only to be looked at belongs in `metrics`, or in the log beside the loss.

    ## Source
    https://github.com/Ugenteraan/Deep_Hierarchical_Classification/issues/6; documentation of `torch.argmax`.
    """

    code = "SL450"
    title = "constant part of the loss"
    hears = ADDS | _DETACHES | _COMPARES | _NOISE | {"rand"}

    def __init__(self) -> None:
        self._activations: set[int] = set()
        """the nodes of activations that were detached"""
        self._noise: dict[int, weakref.ref[Tensor]] = {}
        """uniform noise, by id"""
        self._found: dict[int, Fault] = {}
        """the node of a sum -> what is told where the loss contains it"""
        self._told: set[str] = set()

    def hear(self, call: Call) -> Iterator[Fault]:
        """Remember what was detached, and sums of a scalar with a graph and one without."""
        out = call.out
        if call.name in _DETACHES:
            node = call.tensors[0].grad_fn if call.tensors and call.tensors[0].dim() else None
            if node is not None:
                self._activations.add(number_of(node))
        elif call.name not in ADDS:
            self._follow_samples(call)
        elif isinstance(out, Tensor) and not out.dim() and out.grad_fn is not None:
            for tensor in call.tensors:
                marks = list(call.tape.marks_of(tensor))
                cuts = [mark for mark in marks if mark.kind == "cut"]
                is_sampled = any(mark.kind == "sampled" for mark in marks)
                if cuts and not is_sampled and tensor is not out and not tensor.dim() and not tensor.requires_grad:
                    self._remember(call, out, cuts)
        return iter(())

    def summed(self, roots: Iterable[Tensor]) -> Iterator[Fault]:
        """The faults of losses that are about to be differentiated."""
        for number in summands(roots) if self._found else ():
            fault = self._found.pop(number, None)
            if fault is not None and fault.where not in self._told:
                self._told.add(fault.where)
                yield fault

    def _follow_samples(self, call: Call) -> None:
        """Mark what is drawn at random: noise that is added to scores, and scores compared with noise."""
        if not isinstance(call.out, Tensor):
            return
        known = (self._noise.get(id(tensor)) for tensor in call.tensors)
        is_sample = call.name in _COMPARES and any(n is not None and n() is not None for n in known)
        if call.name not in _COMPARES:
            self._noise[id(call.out)] = weakref.ref(call.out)
        if is_sample or call.name in _NOISE:
            call.tape.mark(call.out, Mark("sampled", call.name, "", call.site, call.tape.module, 0))

    def _remember(self, call: Call, out: Tensor, cuts: list[Mark]) -> None:
        decided = [mark for mark in cuts if mark.name in _DECISIONS]
        detached = [mark for mark in cuts if mark.name in _DETACHES and mark.node in self._activations]
        if len(decided) + len(detached) < len(cuts) or out.grad_fn is None:
            return
        names = call.tape.names_of(cuts[0].live)
        self._found[number_of(out.grad_fn)] = self.fault(
            f"a part of the loss that was computed from {listed(names)} has no graph: it is a constant there",
            where=f"{at(cuts[0].site, 'an unknown line')}; added at {at(call.site, 'the loss')}",
            why=f"its path to the parameters ends in {cuts[0].reason}; it is logged and trains nothing",
            fix="compute it from probabilities (softmax, sigmoid) in place of decisions, and without detach(); what is "
            "only to be looked at belongs in the log beside the loss",
            names=names,
            severity="error" if all(mark.name in _CHOICES for mark in cuts) else "warning",
        )


def summands(roots: Iterable[Tensor]) -> Iterator[int]:
    """The nodes whose results are added to a loss, times a constant at most."""
    waiting: list[Any] = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen: set[int] = set()
    while waiting and len(seen) < _MOST:
        node = waiting.pop()
        number = number_of(node)
        parts = [part for part, _ in node.next_functions if part is not None]
        is_product = node.name() in _FACTORS
        is_constant_factor = len(parts) == 1 and (node.name() != "DivBackward0" or node.next_functions[0][0])
        if number in seen or node.name() not in _LINEAR or (is_product and not is_constant_factor):
            continue
        seen.add(number)
        yield number
        waiting += parts


def parts_of(root: Tensor) -> Iterator[int]:
    """The nodes of what is added up in a loss."""
    if root.grad_fn is None:
        return
    yield number_of(root.grad_fn)
    sums = set(summands([root]))
    waiting: list[Any] = [root.grad_fn]
    while waiting:
        for part, _ in waiting.pop().next_functions:
            if part is not None:
                yield number_of(part)
                waiting += [part] if number_of(part) in sums else []
