"""Gradient geometry at the price of one backward: norms and cosines of each loss term's gradient at the shared cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node

from safeloop.autograd.cut import Cut, Edge, Tap, shared_cut

Hook: TypeAlias = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Geometry:
    """Scalar products of the terms' gradients at the shared cut, weights included.

    How to read it: at the cut, not at the parameters. A cosine below 0 says that two terms pull the last features that
    they share in opposite directions. A norm here is no measure of the norm of the parameters' gradient.
    """

    gram: Tensor
    """`[K, K]`, float32 or float64, on the device; rows as the roots; 0 where two terms have no cut tensor in common"""
    pairs: tuple[tuple[int, int], ...]
    """the terms, i < j, that have a cut tensor in common: only for them does a cosine say anything"""

    @property
    def norms(self) -> Tensor:
        """The norm of each term's gradient, `[K]`; 0 for a term that does not reach the cut."""
        return self.gram.diagonal().sqrt()

    @property
    def cosines(self) -> Tensor:
        """`[K, K]`, in -1..1; 0 where a gradient is zero or the pair is not in `pairs`."""
        norms = self.norms.clamp(min=torch.finfo(self.gram.dtype).tiny)
        return self.gram / norms.unsqueeze(1) / norms


def backward_with_taps(roots: Sequence[Tensor], seeds: Sequence[Tensor]) -> Geometry | None:
    """`torch.autograd.backward(roots, seeds)`, and each root's gradient at the shared cut on the way.

    With the cut tensors `z` and root k a function of them, `g_k = seeds_k d(roots_k)/dz`, the part that reaches `z`
    through no other cut tensor; `gram_ij = <g_i, g_j>`. The gradient of a parameter below the cut is the sum over k of
    `(dz/dw)^T g_k`. What ends up in `.grad` is bitwise what the plain call gives, as it is the same engine pass:
    hooks look at gradients and change none. No sync.

    Cost: 0.02 ms and about 5 us for each term to find the cut and hook it, K (K + 1) / 2 dot products for each cut
    tensor, and each term's gradient at the cut kept until all of them are there.

    Args:
        roots: what to differentiate, of any shape; those without a graph are passed on to torch as they are.
        seeds: the gradient to begin with for each root: its weight.

    Returns:
        None where there is nothing to compare: one root, roots that share nothing or only leaves, gradients that are
        nested or of a tensor subclass; or where the engine ran in an order that the walk did not foresee.
    """
    cut = shared_cut(roots)
    if not cut.taps and not cut.roots:
        torch.autograd.backward(roots, seeds)
        return None
    recorder = _Recorder(cut, seeds)
    handles = []
    try:
        for node, hook in recorder.captures():
            handles.append(node.register_hook(hook))
        for node, hook in recorder.arrivals():
            handles.append(node.register_prehook(hook))
        torch.autograd.backward(roots, seeds)
    finally:
        for handle in handles:
            handle.remove()
    return recorder.geometry(len(roots))


class _Recorder:
    """Collects gradients of one pass at the cut, and multiplies those of a cut tensor as soon as all are there."""

    def __init__(self, cut: Cut, seeds: Sequence[Tensor]) -> None:
        self._cut = cut
        self._arrived: dict[Edge, dict[int, Tensor]] = {}
        self._products: dict[tuple[int, int], Tensor] = {}
        self._has_crossed = False
        self._is_valid = True
        for edge, term in cut.roots:
            self._add(edge, term, seeds[term])

    def captures(self) -> list[tuple[Node, Hook]]:
        """A hook for each consumer."""
        by_consumer: dict[Node, list[Tap]] = {}
        for tap in self._cut.taps:
            by_consumer.setdefault(tap.consumer, []).append(tap)
        return [(consumer, self._capture(taps)) for consumer, taps in by_consumer.items()]

    def arrivals(self) -> list[tuple[Node, Hook]]:
        """A hook for each node of the cut, and for the others at which the walk stopped."""
        edges: dict[Node, list[Edge]] = {node: [] for node in self._cut.below}
        for edge in self._cut.edges:
            edges.setdefault(edge[0], []).append(edge)
        below = set(self._cut.below)
        return [(node, self._arrive(own, is_below=node in below)) for node, own in edges.items()]

    def geometry(self, num_terms: int) -> Geometry | None:
        """What was measured, after the pass."""
        if not self._is_valid or not self._products:
            return None
        first = next(iter(self._products.values()))
        is_double = any(product.dtype == torch.float64 for product in self._products.values())
        dtype = torch.float64 if is_double else torch.float32
        zero = torch.zeros((), dtype=dtype, device=first.device)
        entries = [
            self._products[pair].to(first.device, dtype) if pair in self._products else zero
            for pair in ((min(i, j), max(i, j)) for i in range(num_terms) for j in range(num_terms))
        ]
        pairs = tuple(sorted((i, j) for i, j in self._products if i != j))
        return Geometry(torch.stack(entries).view(num_terms, num_terms), pairs)

    def _capture(self, taps: list[Tap]) -> Hook:
        def capture(grad_inputs: Sequence[Tensor | None], grad_outputs: Sequence[Tensor | None]) -> None:
            if self._has_crossed:  # a path from a shared node to this one that the walk could not see
                self._is_valid = False
            for tap in taps:
                gradient = grad_inputs[tap.position]
                if gradient is not None:
                    self._add(tap.edge, tap.term, gradient)

        return capture

    def _arrive(self, edges: list[Edge], *, is_below: bool) -> Hook:
        def arrive(grad_outputs: Sequence[Tensor | None]) -> None:
            self._has_crossed = self._has_crossed or is_below
            for edge in edges:
                self._multiply(self._arrived.pop(edge, {}))

        return arrive

    def _add(self, edge: Edge, term: int, gradient: Tensor) -> None:
        there = self._arrived.setdefault(edge, {})
        there[term] = there[term] + gradient if term in there else gradient

    def _multiply(self, gradients: dict[int, Tensor]) -> None:
        if not all(map(_is_plain, gradients.values())):
            self._is_valid = False
            return
        vectors = sorted((term, _vector(gradient)) for term, gradient in gradients.items())
        for i, (first, left) in enumerate(vectors):
            for second, right in vectors[i:]:
                product = torch.dot(left, right)
                known = self._products.get((first, second))
                self._products[first, second] = product if known is None else known + product.to(known.device)


def _is_plain(gradient: Tensor) -> bool:
    return type(gradient) is Tensor and gradient.layout in (torch.strided, torch.sparse_coo) and not gradient.is_nested


def _vector(gradient: Tensor) -> Tensor:
    """All entries in a row, float32 or float64; a complex number is two real ones."""
    dense = gradient.to_dense() if gradient.is_sparse else gradient
    real = torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense
    return real.reshape(-1).to(torch.promote_types(real.dtype, torch.float32))
