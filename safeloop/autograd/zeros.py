"""Finds the operations in which a gradient becomes exactly zero, or ends."""

from __future__ import annotations

import linecache
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from safeloop.autograd.numbers import number_of
from safeloop.autograd.sites import Site, code_name
from safeloop.autograd.survey import leaves_below

_LEAF = "torch::autograd::AccumulateGrad"
_PASSES_ON = (
    *("Add", "Sub", "Neg", "Sum", "Mean", "Expand", "View", "UnsafeView", "Reshape", "Squeeze", "Unsqueeze", "Clone"),
    *("T", "Transpose", "Permute", "Cat", "Stack", "ToCopy", "Alias", "AsStrided", "Repeat", "CumSum", "Movedim"),
)
"""Nodes whose derivative is never zero: what becomes zero there was cancelled, as in a loss that no shift changes."""
_SUMS = ("Add", "Sub", "Rsub", "Neg", "Lerp")
"""Nodes of which several that cancel show a straight-through estimator; two uses of a bias may cancel rightly."""
Kind = Literal["zero", "empty", "dropped", "hooked", "cancelled", "attention"]

_ONE_BY_ONE = ("Softmax", "Mul", "Div", "MaskedFill", "View", "UnsafeView", "ToCopy", "Tanh")
"""Nodes after which the last dimension of a linear layer's output is still the last one, as a rule."""
_PICKS = ("Topk", "Max", "Sort", "Kthvalue")
"""Nodes that pick some of many, as a router does: the softmax of a single one is always 1"""


class Stop(NamedTuple):
    """A node that takes in a gradient and lets nothing through, or nothing to these leaves."""

    name: str
    number: int
    leaves: frozenset[int]
    """ids of the leaves that lie behind it"""
    kind: Kind = "zero"
    """`empty`: it was run on a batch of no sample; `dropped`: a custom function that returns None; `hooked`: a hook on
    its result has made a gradient zero; `cancelled`: the gradients of several uses of its result add up to zero;
    `attention`: it weighs the values of a single key, whatever the query: the weight is 1"""
    site: Site | None = None
    """where the custom function or the hook was written"""


class ZeroTrace:
    """Watches one backward pass: hooks on the nodes of a graph, until `finish`.

    Args:
        roots: where the pass begins.
        most: give up on graphs with more nodes.
    """

    def __init__(self, roots: Iterable[Tensor], most: int = 20_000) -> None:
        self._handles: list[Any] = []
        self._stops: list[tuple[Any, list[Any], Kind]] = []
        self._givers: dict[Any, list[Any]] = {}
        """node -> those that gave it a gradient that is not zero, before any hook on its result"""
        self._silent: set[Any] = set()
        waiting: list[Any] = [root.grad_fn for root in roots if root.grad_fn is not None]
        seen: set[Any] = set(waiting)
        while waiting and len(seen) <= most:
            node = waiting.pop()
            if node.name() == _LEAF:
                continue
            self._handles.append(node.register_hook(self._hook(node)))
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    waiting.append(following)

    def _hook(self, node: Any) -> Any:
        def look(grad_inputs: tuple[Tensor | None, ...], grad_outputs: tuple[Tensor | None, ...]) -> None:
            taken = [g for g in grad_outputs if g is not None]
            if taken and all(not g.numel() for g in taken):
                self._stops.append((node, [node], "empty"))
            elif any(map(_any, taken)):
                self._passed(node, grad_inputs, taken[0].shape)
            elif taken:
                self._silent.add(node)

        return look

    def _passed(self, node: Any, given: Sequence[Tensor | None], shape: torch.Size) -> None:
        """A node that took in something, of this shape: what it gave on."""
        edges = list(zip(given, node.next_functions, strict=False))
        ways = [(g, following) for g, (following, _) in edges if g is not None and following is not None]
        for g, (following, index) in edges:
            if g is not None and following is not None and _fits(g, following, index) and _any(g):
                self._givers.setdefault(following, []).append(node)
        if isinstance(node, BackwardCFunction):
            dropped = [following for g, (following, _) in edges if g is None and following is not None]
            if dropped:
                self._stops.append((node, dropped, "dropped"))
        if node.name().partition("Backward")[0] in _PASSES_ON:
            return
        stopped = [following for g, following in ways if not _any(g)]
        if len(stopped) < len(ways):  # its own weights may cancel; what is behind its input is stopped
            stopped = [following for following in stopped if not _is_parameter(following)]
        if stopped:
            self._stops.append((node, stopped, "attention" if _attends_to_one(node, shape) else "zero"))

    def finish(self) -> list[Stop]:
        """Take the hooks away; the nodes that let nothing through, the one nearest to the loss first."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        stops = [*self._stops]
        for node in self._silent:
            if givers := self._givers.get(node):
                stops.append((node, [node], "hooked" if len(givers) == 1 else "cancelled"))
        fed = {id(node.variable) for node in self._givers if node.name() == _LEAF}
        found = [
            Stop(
                node.name(),
                max(number_of(n) for n in (self._givers[node] if kind == "cancelled" else [node])),
                frozenset().union(*(leaves_below(way) for way in ways)) - fed,
                kind,
                _written(node) if kind == "dropped" else None,
            )
            for node, ways, kind in stops
        ]
        found += self._given_leaves()
        self._stops.clear()
        self._silent.clear()
        self._givers.clear()
        return sorted(found, key=lambda stop: (stop.kind != "empty", -stop.number))

    def _given_leaves(self) -> Iterable[Stop]:
        """Leaves that were given something: where it became zero, by hooks of their own, or since it cancels."""
        for node, givers in self._givers.items():
            if node.name() != _LEAF:
                continue
            leaf = frozenset([id(node.variable)])
            if (hook := _hook_of(node.variable)) is not None:
                yield Stop(node.name(), -1, leaf, "hooked", _site(hook))
            elif len(givers) > 1 and all(giver.name().partition("Backward")[0] in _SUMS for giver in givers):
                yield Stop(node.name(), max(number_of(giver) for giver in givers), leaf, "cancelled")


def _hook_of(leaf: Tensor) -> Callable[..., Any] | None:
    for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if hooks := getattr(leaf, name, None):
            return next(iter(hooks.values()))  # type: ignore[no-any-return]
    return None


def _site(function: Any) -> Site | None:
    code = getattr(function, "__code__", None)
    if code is None:
        return None
    line = code.co_firstlineno
    while linecache.getline(code.co_filename, line).lstrip().startswith("@"):  # a decorator says nothing
        line += 1
    return Site(code.co_filename, line, code_name(code))


def _written(node: Any) -> Site | None:
    """Where the backward of a custom function was written."""
    return _site(getattr(getattr(node, "_forward_cls", None), "backward", None))


def _fits(gradient: Tensor, node: Any, index: int) -> bool:
    """Whether a gradient has the shape of what it is of; else torch sums it, and it may become zero there."""
    known = getattr(node, "_input_metadata", ())
    return index < len(known) and tuple(known[index].shape) == tuple(gradient.shape)


def _is_parameter(node: Any) -> bool:
    """Whether a leaf lies behind this edge with nothing but changes of its shape on the way."""
    while node.name() != _LEAF:
        ways = [following for following, _ in node.next_functions if following is not None]
        if len(ways) != 1 or node.name().partition("Backward")[0] not in _PASSES_ON:
            return False
        node = ways[0]
    return True


def _attends_to_one(node: Any, shape: torch.Size) -> bool:
    """Whether a softmax runs over the one item of a sequence: not the one output of a layer, or the best of many."""
    kind = _kind(node)
    if kind.startswith("ScaledDotProduct"):
        return True
    if kind not in ("Softmax", "SafeSoftmax"):
        return False
    last, dim = len(shape) - 1, int(node._saved_dim)
    if shape[dim if dim <= last else dim - 2**64] != 1:
        return False
    source = _source(node)
    if source is None or dim not in (last, 2**64 - 1):
        return True
    is_layer = _kind(source) in ("Addmm", "Mm") and any(_is_parameter(n) for n, _ in source.next_functions if n)
    return not is_layer and _kind(source) not in _PICKS


def _source(node: Any) -> Any:
    """What made the last dimension of that which goes into a node, by all signs; None where paths meet."""
    while _kind(node) in _ONE_BY_ONE:
        ways = [following for following, _ in node.next_functions if following is not None]
        if len(ways) != 1:
            return None
        node = ways[0]
    return node


def _kind(node: Any) -> str:
    return str(node.name()).partition("Backward")[0]


def _any(gradient: Tensor) -> bool:
    values = gradient._values() if gradient.is_sparse else gradient
    return bool(values.detach().any())
