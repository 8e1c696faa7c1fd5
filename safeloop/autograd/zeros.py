"""Finds the operations in which a gradient becomes exactly zero."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from safeloop.autograd.survey import leaves_below

_LEAF = "torch::autograd::AccumulateGrad"


class Stop(NamedTuple):
    """A node that takes in a gradient and lets nothing through."""

    name: str
    number: int
    leaves: frozenset[int]
    """ids of the leaves that lie behind it"""


class ZeroTrace:
    """Watches one backward pass: hooks on the nodes of a graph, until `finish`.

    Args:
        roots: where the pass begins.
        most: give up on graphs with more nodes.
    """

    def __init__(self, roots: Iterable[Tensor], most: int = 20_000) -> None:
        self._handles: list[Any] = []
        self._stops: list[tuple[Any, int]] = []
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
            given = [g for g in grad_inputs if g is not None]
            if given and not any(map(_any, given)) and any(_any(g) for g in grad_outputs if g is not None):
                self._stops.append((node, int(node._sequence_nr())))

        return look

    def finish(self) -> list[Stop]:
        """Take the hooks away; the nodes that let nothing through, the one nearest to the loss first."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        found = [Stop(node.name(), number, frozenset(leaves_below(node))) for node, number in self._stops]
        self._stops.clear()
        return sorted(found, key=lambda stop: -stop.number)


def _any(gradient: Tensor) -> bool:
    values = gradient._values() if gradient.is_sparse else gradient
    return bool(values.detach().any())
