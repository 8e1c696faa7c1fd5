"""Straight-through estimators whose detach is in the wrong place."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

from torch import Tensor

from safeloop.autograd.numbers import number_of
from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck
from safeloop.checks.source import at
from safeloop.checks.wording import listed
from safeloop.faults import Fault

_DETACHES = frozenset(("detach", ".data"))
_SUMS = frozenset(("add", "__add__", "__radd__", "add_", "__iadd__"))
_DIFFERENCES = frozenset(("sub", "__sub__", "subtract"))

_Key = tuple[int, int]
"""One tensor of the graph, whatever Python object holds it"""


class StraightThroughReversed(CallCheck):
    """A straight-through estimator passes on no gradient, or one of the wrong sign.

    ## What it does
    Hears `x.detach() + (q - x)`, also as `x.detach() + q - x`, and `x + (q - x)` where `q` has no gradient, on the
    steps that are looked at in depth. `x + (q - x).detach()` and a plain `q` are not told, nor are sums of scalars or a
    difference that is scaled before it is added. Cost: none beyond the tape of calls.

    ## Why it is bad
    The value is `q` in every form, so that the loss looks right. In the first one the only path to `x` is that of the
    subtraction: its gradient arrives with the sign turned, and training climbs. In the other one the two paths cancel.

    ## Bad
    ```python
    class Round(nn.Module):
        def forward(self, x):
            return x.detach() + (x.round() - x)

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    sgd = {"type": "SGD", "lr": 0.1}
    model = nn.Sequential(nn.Linear(4, 4), Round())
    Run(model=model, data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Round(nn.Module):
        def forward(self, x):
            return x + (x.round() - x).detach()

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    sgd = {"type": "SGD", "lr": 0.1}
    model = nn.Sequential(nn.Linear(4, 4), Round())
    Run(model=model, data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Detach the difference: `x + (q - x).detach()`. Where a gradient of the opposite sign is meant, write
    `2 * x.detach() - x` or a `torch.autograd.Function`, which say so.

    ## Source
    Bengio, Leonard, Courville (2013): https://arxiv.org/abs/1308.3432; van den Oord et al. (2017):
    https://arxiv.org/abs/1711.00937.
    """

    code = "SL330"
    title = "straight-through estimator the wrong way round"
    hears = _DETACHES | _SUMS | _DIFFERENCES

    def __init__(self) -> None:
        self._detached: dict[int, tuple[weakref.ref[Tensor], _Key]] = {}
        """id of the result of a detach -> the tensor that it was taken of"""
        self._less: dict[int, tuple[weakref.ref[Tensor], _Key, bool, int]] = {}
        """id of `q - x` -> x, whether `q` has a graph, and the parameters that `x` has a path to"""
        self._joined: dict[int, tuple[weakref.ref[Tensor], _Key]] = {}
        """id of `x.detach() + q` -> x"""
        self._told: set[str] = set()

    def hear(self, call: Call) -> Iterator[Fault]:
        """Follow detached tensors and differences to the sum that joins them."""
        if not call.grad_mode or not isinstance(call.out, Tensor) or not call.tensors or not call.out.dim():
            return
        first = call.tensors[0]
        if call.name in _DETACHES:
            if (source := _key(first)) is not None:
                self._detached[id(call.out)] = weakref.ref(call.out), source
        elif len(call.tensors) == 2 and not call.kwargs:
            second = call.tensors[1]
            if call.name in _DIFFERENCES:
                yield from self._subtracted(call, first, second)
            else:
                yield from self._added(call, first, second)

    def _subtracted(self, call: Call, first: Tensor, second: Tensor) -> Iterator[Fault]:
        """Remember `q - x`; `(x.detach() + q) - x` is told."""
        if (source := _key(second)) is None:
            return
        if (joined := self._joined.get(id(first))) is not None and joined[0]() is first and joined[1] == source:
            yield from self._tell(call, call.tape.live(second), is_turned=True)
        self._less[id(call.out)] = weakref.ref(call.out), source, first.requires_grad, call.tape.live(second)

    def _added(self, call: Call, first: Tensor, second: Tensor) -> Iterator[Fault]:
        """Tell the two wrong forms, and remember `x.detach() + q`."""
        for one, other in ((first, second), (second, first)):
            less = self._less.get(id(other))
            if less is not None and less[0]() is not other:
                less = None  # an id that was used before
            detached = self._detached.get(id(one))
            if detached is not None and detached[0]() is one:
                self._joined[id(call.out)] = weakref.ref(call.out), detached[1]
                if less is not None and less[1] == detached[1]:
                    yield from self._tell(call, less[3], is_turned=True)
            elif less is not None and less[1] == _key(one) and not less[2]:
                yield from self._tell(call, less[3], is_turned=False)

    def _tell(self, call: Call, live: int, *, is_turned: bool) -> Iterator[Fault]:
        module = call.tape.module
        place = at(call.site, f"module `{module}`")
        if place in self._told:
            return
        self._told.add(place)
        names = call.tape.names_of(live)
        path = "with the sign turned" if is_turned else "as zero: its two paths cancel"
        form = "x.detach() + (q - x)" if is_turned else "x + (q - x) with a `q` that has no graph"
        yield self.fault(
            f"a straight-through estimator the wrong way round, {form}: the gradient arrives at `x` {path}",
            where=place + (f"; module `{module}`" if module else ""),
            why=f"the value is `q`, as it should be, so that the loss looks right; it reaches {listed(names)}"
            if names
            else "the value is `q`, as it should be, so that the loss looks right",
            fix="detach the difference: `x + (q - x).detach()`",
            names=names,
        )


def _key(tensor: Tensor) -> _Key | None:
    """What stands for a tensor of the graph; None for one without gradient."""
    if not tensor.requires_grad:
        return None
    node = tensor.grad_fn
    return (-1, id(tensor)) if node is None else (number_of(node), tensor.output_nr)
