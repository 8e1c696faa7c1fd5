"""Finds the operations in which a gradient becomes exactly zero."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from safeloop.autograd.survey import leaves_below

_LEAF = "torch::autograd::AccumulateGrad"
_PASSES_ON = (
    *("Add", "Sub", "Neg", "Sum", "Mean", "Expand", "View", "UnsafeView", "Reshape", "Squeeze", "Unsqueeze", "Clone"),
    *("T", "Transpose", "Permute", "Cat", "Stack", "ToCopy", "Alias", "AsStrided", "Repeat", "CumSum", "Movedim"),
)
"""Nodes whose derivative is never zero: what becomes zero there was cancelled, as in a loss that no shift changes."""


class Stop(NamedTuple):
    """A node that takes in a gradient and lets nothing through, or nothing to these leaves."""

    name: str
    number: int
    leaves: frozenset[int]
    """ids of the leaves that lie behind it"""
    is_empty: bool = False
    """whether it was run on a batch of no sample"""


class ZeroTrace:
    """Watches one backward pass: hooks on the nodes of a graph, until `finish`.

    Args:
        roots: where the pass begins.
        most: give up on graphs with more nodes.
    """

    def __init__(self, roots: Iterable[Tensor], most: int = 20_000) -> None:
        self._handles: list[Any] = []
        self._stops: list[tuple[Any, list[Any], bool]] = []
        self._fed: set[int] = set()
        """ids of leaves that some node gave a gradient to: where their sum is zero, the uses cancel each other"""
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
                self._stops.append((node, [node], True))
            elif any(map(_any, taken)):
                given = [(g, following) for g, (following, _) in zip(grad_inputs, node.next_functions, strict=False)]
                ways = [(g, following) for g, following in given if g is not None and following is not None]
                self._fed |= {id(way.variable) for g, way in ways if way.name() == _LEAF and _any(g)}
                stopped = [following for g, following in ways if not _any(g)]
                if len(stopped) < len(ways):  # its own weights may cancel; what is behind its input is stopped
                    stopped = [following for following in stopped if not _is_parameter(following)]
                if stopped and node.name().partition("Backward")[0] not in _PASSES_ON:
                    self._stops.append((node, stopped, False))

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
                frozenset().union(*(leaves_below(way) for way in ways)) - self._fed,
                is_empty,
            )
            for node, ways, is_empty in self._stops
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


def _any(gradient: Tensor) -> bool:
    values = gradient._values() if gradient.is_sparse else gradient
    return bool(values.detach().any())
