"""Finds the operations in which a gradient becomes exactly zero."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safeloop.autograd.survey import leaves_below

_LEAF = "torch::autograd::AccumulateGrad"
_PASSES_ON = (
    *("Add", "Sub", "Neg", "Sum", "Mean", "Expand", "View", "UnsafeView", "Reshape", "Squeeze", "Unsqueeze", "Clone"),
    *("T", "Transpose", "Permute", "Cat", "Stack", "ToCopy", "Alias", "AsStrided", "Repeat", "CumSum", "Movedim"),
)
"""Nodes whose derivative is never zero: what becomes zero there was cancelled, as in a loss that no shift changes."""


_ONE_BY_ONE = ("Softmax", "Mul", "Div", "MaskedFill", "View", "UnsafeView", "ToCopy", "Tanh")
"""Nodes after which the last dimension of a linear layer's output is still the last one, as a rule."""


class Stop(NamedTuple):
    """A node that takes in a gradient and lets nothing through, or nothing to these leaves."""

    name: str
    number: int
    leaves: frozenset[int]
    """ids of the leaves that lie behind it"""
    is_empty: bool = False
    """whether it was run on a batch of no sample"""
    is_attention: bool = False
    """whether it weighs the values of a single key, whatever the query: the weight is 1"""


class ZeroTrace:
    """Watches one backward pass: hooks on the nodes of a graph, until `finish`.

    Args:
        roots: where the pass begins.
        most: give up on graphs with more nodes.
    """

    def __init__(self, roots: Iterable[Tensor], most: int = 20_000) -> None:
        self._handles: list[Any] = []
        self._stops: list[tuple[Any, list[Any], bool, torch.Size]] = []
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
                self._stops.append((node, [node], True, taken[0].shape))
            elif any(map(_any, taken)) and node.name().partition("Backward")[0] not in _PASSES_ON:
                given = [(g, following) for g, (following, _) in zip(grad_inputs, node.next_functions, strict=False)]
                ways = [(g, following) for g, following in given if g is not None and following is not None]
                stopped = [following for g, following in ways if not _any(g)]
                if len(stopped) < len(ways):  # its own weights may cancel; what is behind its input is stopped
                    stopped = [following for following in stopped if not _is_parameter(following)]
                if stopped:
                    self._stops.append((node, stopped, False, taken[0].shape))

        return look

    def finish(self) -> list[Stop]:
        """Take the hooks away; the nodes that let nothing through, the one nearest to the loss first."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        found = [
            Stop(
                node.name(),
                int(node._sequence_nr()),
                frozenset().union(*(leaves_below(way) for way in ways)),
                is_empty,
                _attends_to_one(node, shape),
            )
            for node, ways, is_empty, shape in self._stops
        ]
        self._stops.clear()
        return sorted(found, key=lambda stop: (not stop.is_empty, -stop.number))


def _is_parameter(node: Any) -> bool:
    """Whether a leaf lies behind this edge with nothing but changes of its shape on the way."""
    while node.name() != _LEAF:
        ways = [following for following, _ in node.next_functions if following is not None]
        if len(ways) != 1 or node.name().partition("Backward")[0] not in _PASSES_ON:
            return False
        node = ways[0]
    return True


def _attends_to_one(node: Any, shape: torch.Size) -> bool:
    """Whether a softmax runs over the one item of a sequence, not over the one output of a linear layer."""
    kind = node.name().partition("Backward")[0]
    if kind.startswith("ScaledDotProduct"):
        return True
    if kind not in ("Softmax", "SafeSoftmax"):
        return False
    last, dim = len(shape) - 1, int(node._saved_dim)
    if shape[dim if dim <= last else dim - 2**64] != 1:
        return False
    return dim not in (last, 2**64 - 1) or not _is_linear_output(node)


def _is_linear_output(node: Any) -> bool:
    """Whether the last dimension of what goes into a node is, by all signs, that of a linear layer's outputs."""
    while (kind := node.name().partition("Backward")[0]) in _ONE_BY_ONE:
        ways = [following for following, _ in node.next_functions if following is not None]
        if len(ways) != 1:
            return False
        node = ways[0]
    return kind in ("Addmm", "Mm") and any(_is_parameter(way) for way, _ in node.next_functions if way is not None)


def _any(gradient: Tensor) -> bool:
    values = gradient._values() if gradient.is_sparse else gradient
    return bool(values.detach().any())
