"""The order in which the nodes of a graph were made, over all threads that make them.

torch numbers nodes in each thread from 0. A forward is numbered by the thread of the loop; the graph that a backward
pass makes (`create_graph=True`) on an accelerator, by a thread of the engine: a node of this very moment bears a number
that the loop's thread has given long ago, or will give once more. `renumbered` finds such nodes and writes where they
stand into the metadata that torch keeps with a node; torch's own number, which the engine goes by, stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_KEY = "safeloop.number"
_BITS = 20
"""Between two numbers of the loop's thread there is room for 2**20 others."""
_last: list[int] = []
"""the last number written on a node; empty as long as all numbers are torch's own"""


def next_number() -> int:
    """The number of the next node that this thread makes."""
    return int(torch.autograd._get_sequence_nr()) << _BITS  # type: ignore[attr-defined]


def number_of(node: Any) -> int:
    """Where a node stands in the order in which nodes were made; those of leaves come last."""
    if _last and (written := node.metadata.get(_KEY)) is not None:
        return int(written)
    return int(node._sequence_nr()) << _BITS


@contextmanager
def renumbered(known: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Backward passes that may make a graph; what they have made is put into the list, to be numbered at the end.

    Args:
        known: what is differentiated: nodes below it were made before.
    """
    made: list[Tensor] = []
    before = list(known)
    if not any(map(runs_elsewhere, before)):
        yield made
        return
    first = next_number()
    yield made
    if not any(tensor.requires_grad for tensor in made):
        return
    last = next_number()
    new = _below(made) - _below(before)
    foreign = [n for n in new if n.next_functions and not first <= number_of(n) < last and _KEY not in n.metadata]
    number = max([last - (1 << _BITS), *_last])
    for node in sorted(foreign, key=number_of):
        node.metadata[_KEY] = number = number + 1
    if foreign:
        _last[:] = [number]


def runs_elsewhere(tensor: Tensor) -> bool:
    """Whether the backward pass of a tensor runs in another thread than its forward."""
    return not tensor.is_cpu


def _below(tensors: Iterable[Tensor]) -> set[Any]:
    """The nodes that these tensors lead to, also at the outer levels of a transform of torch.func."""
    waiting = [node for tensor in tensors for node in _nodes_of(tensor)]
    seen = set(waiting)
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None and node not in seen:
                seen.add(node)
                waiting.append(node)
    return seen


def _nodes_of(tensor: Tensor) -> Iterator[Any]:
    if tensor.grad_fn is not None:
        yield tensor.grad_fn
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        yield from _nodes_of(torch._C._functorch.get_unwrapped(tensor))
