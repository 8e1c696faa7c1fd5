"""Paths that are cut where another path of the same tensor goes on, so that every parameter still has a gradient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from safeloop.autograd.lineage import Mark
from safeloop.autograd.numbers import number_of
from safeloop.autograd.sites import Site
from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck
from safeloop.checks.source import at
from safeloop.faults import Fault

_SUMS = frozenset(["add", "__add__", "__radd__", "add_", "__iadd__", "cat", "concat", "concatenate", "stack"])
_SOFTMAX = frozenset(["softmax"])
_LAYERS = frozenset(
    [*("linear", "conv1d", "conv2d", "conv3d", "matmul", "__matmul__"), *("layer_norm", "batch_norm", "group_norm")]
)
_OF_DATA = "layer of .data"
_NEAR, _FAR = 64, 1000
"""Nodes between the branches of a layer and what both are made of."""
_PRODUCTS = frozenset(["matmul", "__matmul__", "__rmatmul__", "bmm", "einsum", "baddbmm"])
_WEIGHTS = "weights without a path"
_KEPT = 200
"""Products that no backward pass has visited, as in an evaluation."""


class PathCutByData(CallCheck):
    """`.data` drops one of several paths through a tensor: gradients exist everywhere, and are wrong.

    ## What it does
    Tells where `x.data` is added to, or concatenated with, something that is differentiated, and the same `x` goes on
    to the loss by another path; and where a softmax of `scores.data` weighs values that are differentiated, and the
    scores reach the loss in no other way: attention whose queries and keys do not learn, though the parameters that
    they share with the values do. Also where an inner module adds a trained layer of `x.data` to something that is
    made of the same `x`. Differences such as `(q - x).data`, the straight-through estimator, and `.detach()`,
    which says what is meant, are not told. Cost: none beyond the tape of calls.

    ## Why it is bad
    `.data` returns the value without its history. The gradient of a skip connection is dropped, while every parameter
    still has a gradient: deep networks train badly, and nothing shows why.

    ## Bad
    ```python
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return x.data + self.inner(x)

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    sgd = {"type": "SGD", "lr": 0.1}
    model = nn.Sequential(nn.Linear(4, 4), Block())
    Run(model=model, data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return x + self.inner(x)

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    sgd = {"type": "SGD", "lr": 0.1}
    model = nn.Sequential(nn.Linear(4, 4), Block())
    Run(model=model, data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Drop `.data`. Where the path is to be cut on purpose, write `.detach()`.

    ## Source
    https://github.com/pytorch/pytorch/issues/6990.
    """

    code = "SL314"
    title = "path cut by .data"
    severity = "warning"
    hears = _SUMS | _SOFTMAX | _PRODUCTS | _LAYERS

    def __init__(self) -> None:
        self._found: dict[int, tuple[Site | None, str]] = {}
        self._weighed: dict[int, Mark] = {}
        """the node of a product -> the cut of the scores that weigh its values"""
        self._told: set[str] = set()

    def hear(self, call: Call) -> Iterator[Fault]:
        """Remember sums of a `.data` and something that is differentiated, and values that a softmax of it weighs."""
        if call.name in _SOFTMAX:
            self._weigh(call)
        elif any(call.tape.live(t) for t in call.tensors):
            if call.name in _LAYERS:
                self._layer(call)
            if call.name in _SUMS | _PRODUCTS:
                self._remember(call)
        return iter(())

    def _layer(self, call: Call) -> None:
        """Mark what a trained layer makes of a `.data`."""
        tape, given, out = call.tape, call.tensors[0], call.out
        if isinstance(out, Tensor) and out.requires_grad and not given.requires_grad and tape.maker(given) == ".data":
            mark = next((m for m in reversed(list(tape.marks_of(given))) if m.name == ".data"), None)
            if mark is not None and not mark.is_difference and mark.module not in ("", "(root)"):
                tape.mark(out, replace(mark, kind=_OF_DATA))

    def _branches(self, call: Call) -> None:
        """Remember a sum of such a branch and another one of the same tensor, in the same module."""
        for tensor in call.tensors:
            for mark in call.tape.marks_of(tensor):
                if mark.kind != _OF_DATA or mark.module != call.tape.module or _has_node(tensor, mark.node, _FAR):
                    continue
                if any(_has_node(other, mark.node, _NEAR) for other in call.tensors if other is not tensor):
                    self._found[int(mark.node or 0)] = (mark.site, mark.module)

    def _weigh(self, call: Call) -> None:
        cuts = [m for tensor in call.tensors[:1] for m in call.tape.marks_of(tensor) if m.kind == "cut"]
        if len(cuts) == 1 and cuts[0].name == ".data" and isinstance(call.out, Tensor):
            call.tape.mark(call.out, replace(cuts[0], kind=_WEIGHTS))

    def _remember(self, call: Call) -> None:
        if call.name in _SUMS and len(call.tensors) > 1:
            self._branches(call)
        for tensor in call.tensors:
            marks = list(call.tape.marks_of(tensor))
            if call.name in _PRODUCTS:
                cuts = [m for m in marks if m.kind in ("cut", _WEIGHTS)]
                weights = cuts[-1] if len(cuts) == 2 and cuts[-1].kind == _WEIGHTS else None
                others = [call.tape.live(t) for t in call.tensors if t is not tensor]
                node = call.out.grad_fn if isinstance(call.out, Tensor) else None
                if weights is not None and node is not None and _covers(others, weights.live):
                    self._weighed[number_of(node)] = weights
            elif call.tape.maker(tensor) == ".data":
                mark = next((m for m in reversed(marks) if m.name == ".data"), None)
                if mark is not None and mark.node is not None and not mark.is_difference:
                    self._found[mark.node] = (mark.site, mark.module)

    def visited(self, numbers: frozenset[int] | set[int]) -> Iterator[Fault]:
        """The faults of a loss whose graph visits these nodes: the same tensor goes on by another path."""
        for node, (site, module) in self._found.items():
            place = at(site, f"module `{module}`")
            if node in numbers and place not in self._told:
                self._told.add(place)
                yield self.fault(
                    "`.data` of a tensor, or a layer of it, is added to what is computed from the tensor, which is "
                    "differentiated by another path: one of its paths is cut",
                    where=place + (f"; module `{module}`" if module else ""),
                    why="`.data` returns the value without its history: the gradient of a residual or "
                    "skip connection is "
                    "dropped, while every parameter still has a gradient",
                    fix="drop `.data`; where the path is to be cut on purpose, write `.detach()`, which says so",
                    names=(module,) if module else (),
                )
        self._found.clear()
        yield from self._cut_scores(numbers)

    def _cut_scores(self, numbers: frozenset[int] | set[int]) -> Iterator[Fault]:
        for node in [n for n in self._weighed if n in numbers]:
            mark = self._weighed.pop(node)
            place = at(mark.site, f"module `{mark.module}`")
            if mark.node is not None and mark.node not in numbers and place not in self._told:
                self._told.add(place)
                yield self.fault(
                    "the softmax of `scores.data` weighs values that are differentiated, and the scores themselves "
                    "reach the loss in no other way",
                    where=place + (f"; module `{mark.module}`" if mark.module else ""),
                    why="`.data` returns the value without its history: queries and keys do not learn, while the "
                    "parameters that they share with the values have a gradient",
                    fix="drop `.data`; where the weights are meant to be constant, write `.detach()`, which says so",
                    names=(mark.module,) if mark.module else (),
                )
        if len(self._weighed) > _KEPT:
            self._weighed.clear()


def _has_node(tensor: Tensor, number: int | None, most: int) -> bool:
    """Whether a tensor is made of what a node has made, not many operations before."""
    waiting: list[Any] = [tensor.grad_fn]
    seen: set[Any] = set()
    while waiting and len(seen) < most:
        node = waiting.pop(0)
        if node is None or node in seen:
            continue
        seen.add(node)
        if number_of(node) == number:
            return True
        waiting += [way for way, _ in node.next_functions]
    return False


def _covers(others: list[int], bits: int) -> bool:
    """Whether all parameters behind the scores have a path through the values: else, those without one are told."""
    return any(live and not bits & ~live for live in others)
