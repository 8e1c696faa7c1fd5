"""Which of several separate backward passes must keep the graph for a later one: no more than needed, no fewer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.autograd.graph import Node

from safeloop.autograd.cut import Descent, OutOfOrder, is_shared, reaching

_HIDDEN = ("CopySlices", "CppNode")
"""Nodes written in C++ that free something on their pass and show nothing of it in Python."""


def retain_flags(terms: Sequence[Tensor], order: Sequence[int]) -> list[bool]:
    """`retain_graph` for `terms[order[p]].backward(retain_graph=flags[p])`, p = 0, 1, ...

    A pass must keep the graph exactly where a later one visits a node of it that holds saved tensors: terms that share
    only leaves, or nodes that save nothing, need none. The last flag is always False.

    A flag frees nothing by itself: drop the reference to a term after its pass, then what only it held goes at once.

    Cost: as little as the shared cut where one is found, otherwise about 2 us for each node. Nothing runs: tensors
    behind saved-tensor hooks or a checkpoint stay packed. A function written in C++ that hides what it saves counts as
    holding something.
    """
    passes = [terms[k] for k in order]
    wanted = (1 << max(len(passes) - 1, 0)) - 1
    needed = 0
    try:
        descent = Descent(passes)
        while descent and needed != wanted:
            node, mask = descent.pop()
            needed |= _needed_by_later(node, mask, needed)
    except OutOfOrder:
        for node, mask in reaching(passes).items():
            needed |= _needed_by_later(node, mask, needed)
    return [bool(needed >> p & 1) for p in range(len(passes))]


def _needed_by_later(node: Node, mask: int, known: int) -> int:
    """The passes, as bits, that must not free this node: all that visit it but the last."""
    if not is_shared(mask):
        return 0
    all_but_last = mask ^ (1 << (mask.bit_length() - 1))
    return all_but_last if all_but_last & ~known and holds_saved(node) else 0


def holds_saved(node: Node) -> bool:
    """Whether a backward pass without `retain_graph` frees something here, so that a second visit fails."""
    if any(hidden in node.name() for hidden in _HIDDEN):
        return True
    return any(_is_filled(getattr(node, name)) for name in dir(node) if name.startswith("_raw_saved_"))


def _is_filled(saved: object) -> bool:
    """Whether a raw saved attribute holds a tensor; of a list torch asks only whether it was freed."""
    if isinstance(saved, tuple):
        return len(saved) > 0
    return getattr(saved, "data", saved) is not None
