"""Finds the operation in whose derivative a gradient becomes NaN or infinite, while a backward pass runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safeloop.autograd.numbers import number_of

_LEAF = "torch::autograd::AccumulateGrad"


class Source(NamedTuple):
    """A node that was given finite gradients and returned others."""

    name: str
    number: int


class BadTrace:
    """Watches one backward pass by hooks on the nodes of its graph, until `finish`. Each waits for the device.

    Args:
        roots: where the pass begins.
        most: graphs with more nodes are not watched.
    """

    def __init__(self, roots: Iterable[Tensor], most: int = 5_000) -> None:
        self._sources: list[Source] = []
        self._handles: list[Any] = []
        roots = list(roots)
        if any(map(_is_bad, roots)):  # born in the forward: what the backward pass makes of it says nothing
            return
        waiting: list[Any] = [root.grad_fn for root in roots if root.grad_fn is not None]
        seen: set[Any] = set(waiting)
        while waiting and len(seen) <= most:
            node = waiting.pop()
            if node.name() == _LEAF:
                continue
            self._handles.append(node.register_hook(self._hook(node.name(), number_of(node))))
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    waiting.append(following)

    def _hook(self, name: str, number: int) -> Any:
        def look(grad_inputs: tuple[Tensor | None, ...], grad_outputs: tuple[Tensor | None, ...]) -> None:
            if any(map(_is_bad, grad_inputs)) and not any(map(_is_bad, grad_outputs)):
                self._sources.append(Source(name, number))

        return look

    def finish(self) -> Source | None:
        """Take the hooks away; the first node that made a bad gradient of good ones."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        return self._sources[0] if self._sources else None


def _is_bad(gradient: Tensor | None) -> bool:
    if gradient is None or gradient.is_sparse or not (gradient.is_floating_point() or gradient.is_complex()):
        return False
    with torch.no_grad():
        return not bool(gradient.detach().isfinite().all())
