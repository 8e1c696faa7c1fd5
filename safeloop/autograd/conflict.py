"""Backward passes whose gradients are a combination of the terms' own: at the parameters, or at the shared cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from safeloop.autograd.cut import Cut, Edge, Tap, shared_cut
from safeloop.autograd.retain import retain_flags
from safeloop.autograd.taps import Geometry

Factors = Callable[[Tensor], list[float]]
"""From the scalar products of K gradients, `[K, K]` in float64, to K factors."""


class NoSharedCut(Exception):
    """The terms share nothing but leaves."""


class HiddenFeatures(NoSharedCut):
    """The terms meet inside a compiled model, which shows its outputs only, and share none of them."""


class HiddenPath(Exception):
    """The engine ran in an order that the walk over the graph did not foresee."""


class Products(NamedTuple):
    """Scalar products of the terms' gradients."""

    terms: list[int]
    """which of the roots take part, in order: those that have a gradient"""
    gram: Tensor
    """`[len(terms), len(terms)]`, float64"""

    def geometry(self, num_roots: int) -> Geometry:
        """The same for all roots, as `backward_with_taps` has it."""
        gram = self.gram.new_zeros(num_roots, num_roots)
        index = torch.tensor(self.terms, device=gram.device)
        gram[index.unsqueeze(1), index] = self.gram
        return Geometry(gram, tuple((i, j) for i in self.terms for j in self.terms if i < j))


def backward_at_parameters(
    roots: Sequence[Tensor], seeds: Sequence[Tensor], parameters: Sequence[Tensor], factors: Factors
) -> Products:
    """Set each `.grad` to `sum_k c_k g_k`, where `g_k` is the gradient of root k and `c` the factors of `<g_i, g_j>`.

    A parameter that no root reaches keeps no gradient. Cost: one backward pass for each root, and all their gradients
    in memory at once. No hooks after accumulation run; those on the parameters themselves run once for each root.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    flags = retain_flags(roots, range(len(roots)))
    rows = [
        torch.autograd.grad(root, trained, seed, retain_graph=keeps, allow_unused=True)
        for root, seed, keeps in zip(roots, seeds, flags, strict=True)
    ]
    products = Products(list(range(len(rows))), _gram(rows))
    scales = factors(products.gram)
    for parameter, column in zip(trained, zip(*rows, strict=True), strict=True):
        parameter.grad = _combined(column, scales)
    return products


def backward_at_cut(roots: Sequence[Tensor], seeds: Sequence[Tensor], factors: Factors) -> Products:
    """`torch.autograd.backward(roots, seeds)`, but what passes through the shared cut is `sum_k c_k g_k`.

    `g_k` is the gradient of root k at the cut tensors, as `backward_with_taps` has it. Parameters above the cut get
    their plain gradient, all below it the combined one. Where the cut is one node, this is one pass of the engine: a
    hook there replaces the sum that arrives. Where it has several, what lies above the cut is run twice: once to
    measure, then for all, each root's gradient scaled where it enters the cut.

    Raises:
        NoSharedCut: the roots share nothing but leaves; `HiddenFeatures`: nothing that can be seen.
        HiddenPath: a shared node led to a node of one root alone; gradients are then of no use.
    """
    cut = shared_cut(roots)
    nodes = {node for node, _ in cut.edges}
    if not nodes:
        raise NoSharedCut
    if _is_hidden(cut):
        raise HiddenFeatures
    captured = _Captured(cut, seeds)
    return (_one_pass if len(nodes) == 1 else _two_passes)(roots, seeds, captured, factors)


def _is_hidden(cut: Cut) -> bool:
    """Whether the cut is compiled code, each of whose outputs serves one term alone."""
    terms: dict[Edge, set[int]] = {}
    for edge, term in [*((tap.edge, tap.term) for tap in cut.taps), *cut.roots]:
        terms.setdefault(edge, set()).add(term)
    is_compiled = all("CompiledFunction" in node.name() for node, _ in terms)
    return is_compiled and all(len(readers) == 1 for readers in terms.values())


def _one_pass(roots: Sequence[Tensor], seeds: Sequence[Tensor], captured: _Captured, factors: Factors) -> Products:
    (node,) = {node for node, _ in captured.cut.edges}
    found: list[Products] = []

    def replace(grad_outputs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        products = captured.products()
        scales = dict(zip(products.terms, factors(products.gram), strict=True))
        replaced = list(grad_outputs)
        for (_, output), gradients in captured.arrived.items():
            if replaced[output] is not None:
                replaced[output] = _combined(list(gradients.values()), [scales[term] for term in gradients])
        found.append(products)
        return tuple(replaced)

    _run(captured, [node.register_prehook(replace)], lambda: torch.autograd.backward(roots, seeds))
    if not found:
        raise HiddenPath
    return found[0]


def _two_passes(roots: Sequence[Tensor], seeds: Sequence[Tensor], captured: _Captured, factors: Factors) -> Products:
    edges = [GradientEdge(*edge) for edge in captured.cut.edges]
    _run(captured, [], lambda: torch.autograd.grad(roots, edges, seeds, retain_graph=True, allow_unused=True))
    products = captured.products()
    scales = dict(zip(products.terms, factors(products.gram), strict=True))
    own = {term for _, term in captured.cut.roots}
    scaled = [seed * scales[term] if term in own else seed for term, seed in enumerate(seeds)]
    handles = [node.register_hook(_scale(taps, scales)) for node, taps in captured.consumers()]
    try:
        torch.autograd.backward(roots, scaled)
    finally:
        for handle in handles:
            handle.remove()
    return products


class _Captured:
    """Each term's gradient at each cut tensor, as hooks on the consumers see them in one pass."""

    def __init__(self, cut: Cut, seeds: Sequence[Tensor]) -> None:
        self.cut = cut
        self.arrived: dict[Edge, dict[int, Tensor]] = {}
        self.is_closed = False
        self.is_valid = True
        for edge, term in cut.roots:
            self._add(edge, term, seeds[term])

    def consumers(self) -> list[tuple[Node, list[Tap]]]:
        """The nodes that read cut tensors, and what they read."""
        by_consumer: dict[Node, list[Tap]] = {}
        for tap in self.cut.taps:
            by_consumer.setdefault(tap.consumer, []).append(tap)
        return list(by_consumer.items())

    def capture(self, taps: list[Tap]) -> Callable[..., None]:
        """The hook for one consumer."""

        def hook(grad_inputs: Sequence[Tensor | None], grad_outputs: Sequence[Tensor | None]) -> None:
            self.is_valid = self.is_valid and not self.is_closed
            for tap in taps:
                gradient = grad_inputs[tap.position]
                if gradient is not None:
                    self._add(tap.edge, tap.term, gradient)

        return hook

    def close(self, grad_outputs: Sequence[Tensor | None]) -> None:
        """The hook for the nodes below: from here on no consumer may run."""
        self.is_closed = True

    def products(self) -> Products:
        """Of all cut tensors together."""
        terms = sorted({term for gradients in self.arrived.values() for term in gradients})
        rows = [[gradients.get(term) for gradients in self.arrived.values()] for term in terms]
        return Products(terms, _gram(rows))

    def _add(self, edge: Edge, term: int, gradient: Tensor) -> None:
        there = self.arrived.setdefault(edge, {})
        there[term] = there[term] + gradient if term in there else gradient


def _run(captured: _Captured, handles: list[torch.utils.hooks.RemovableHandle], run: Callable[[], object]) -> None:
    try:
        handles += [node.register_hook(captured.capture(taps)) for node, taps in captured.consumers()]
        handles += [node.register_prehook(captured.close) for node in captured.cut.below]
        run()
    finally:
        for handle in handles:
            handle.remove()
    if not captured.is_valid:
        raise HiddenPath


def _scale(taps: list[Tap], scales: dict[int, float]) -> Callable[..., tuple[Tensor | None, ...]]:
    def hook(grad_inputs: Sequence[Tensor | None], grad_outputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        scaled = list(grad_inputs)
        for tap in taps:
            gradient = scaled[tap.position]
            scaled[tap.position] = None if gradient is None else gradient * scales[tap.term]
        return tuple(scaled)

    return hook


def _gram(rows: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """Scalar products of rows of tensors, `[len(rows), len(rows)]`, summed in float64; an absent tensor is zero."""
    device = next((one.device for row in rows for one in row if one is not None), torch.device("cpu"))
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=device)
    for column in zip(*rows, strict=True):
        vectors = [(k, _vector(one)) for k, one in enumerate(column) if one is not None]
        for position, (i, left) in enumerate(vectors):
            for j, right in vectors[position:]:
                gram[i, j] += torch.dot(left, right).to(device)
    return gram.triu() + gram.triu(1).T


def _vector(gradient: Tensor) -> Tensor:
    dense = gradient.to_dense() if gradient.is_sparse else gradient
    real = torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense
    return real.reshape(-1).double()


def _combined(gradients: Sequence[Tensor | None], scales: Sequence[float]) -> Tensor | None:
    total: Tensor | None = None
    for gradient, scale in zip(gradients, scales, strict=True):
        if gradient is None:
            continue
        part = gradient * scale
        if total is not None:  # dense first: torch adds a sparse tensor to a dense one, not the other way round
            part = part + total if total.is_sparse else total + part
        total = part
    return total
