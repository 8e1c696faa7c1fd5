"""What a backward pass from a tensor would visit: leaves and nodes, with their ages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from safeloop.autograd.numbers import number_of
from safeloop.autograd.walk import _OPAQUE

_LEAF = "torch::autograd::AccumulateGrad"


@dataclass(slots=True)
class Survey:
    """A walk over the graph of some tensors. Cost: about 2 us for each node."""

    leaves: dict[int, Tensor] = field(default_factory=dict)
    """id -> leaf whose `.grad` the pass would fill"""
    used_at: dict[int, tuple[int, int]] = field(default_factory=dict)
    """id of a leaf -> the lowest and the highest sequence number of the nodes that use it directly"""
    numbers: set[int] = field(default_factory=set)
    """sequence numbers of the inner nodes"""
    old: list[tuple[Any, Any]] = field(default_factory=list)
    """edges (node, older node) from this iteration's part of the graph into nodes that are older than `since`"""
    is_complete: bool = True
    """False where a re-entrant checkpoint hides a part of the graph"""

    def note_use(self, following: Any, node: Any) -> bool:
        """Note that `node` uses what `following` stands for, if that is a leaf; whether it is."""
        if following.name() != _LEAF:
            return False
        leaf, number = id(following.variable), number_of(node)
        low, high = self.used_at.get(leaf, (number, number))
        self.used_at[leaf] = min(low, number), max(high, number)
        return True


def survey(*roots: Tensor, since: int = 0) -> Survey:
    """Walk from `roots` to the leaves; nodes with a sequence number below `since` count as old and are not entered."""
    found = Survey()
    waiting: list[Any] = []
    seen: set[Any] = set()
    for root in roots:
        if root.grad_fn is not None:
            waiting += [] if root.grad_fn in seen else [root.grad_fn]
            seen.add(root.grad_fn)
        elif root.requires_grad:
            found.leaves[id(root)] = root
    while waiting:
        node = waiting.pop()
        name = node.name()
        if name == _LEAF:
            found.leaves[id(node.variable)] = node.variable
            continue
        found.numbers.add(number_of(node))
        if name == _OPAQUE:
            found.is_complete = False
        for following, _ in node.next_functions:
            if following is None:
                continue
            is_leaf = found.note_use(following, node)
            if following in seen:
                continue
            seen.add(following)
            if not is_leaf and number_of(following) < since:
                found.old.append((node, following))
            else:
                waiting.append(following)
    return found


def leaves_below(*nodes: Any, beside: str = "") -> dict[int, Tensor]:
    """id -> leaf, of what lies below some nodes; not of what only nodes of the kind `beside` lead to."""
    leaves: dict[int, Tensor] = {}
    waiting, seen = list(nodes), set(nodes)
    while waiting:
        current = waiting.pop()
        if beside and current.name().startswith(beside):
            continue
        if current.name() == _LEAF:
            leaves[id(current.variable)] = current.variable
        for following, _ in current.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return leaves
