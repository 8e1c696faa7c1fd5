"""What stands in the way of a second derivative, read from graphs before a backward pass runs into it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import Node, get_gradient_edge

_CERTAIN = ("CheckpointFunctionBackward", "CompiledFunctionBackward")
"""Nodes that no second pass gets through: a re-entrant checkpoint serves `.backward()` alone, AOT autograd one pass."""

_LIKELY = (
    "ScaledDotProduct",
    "CdistBackward",
    "PdistBackward",
    "EmbeddingBagBackward",
    "CtcLossBackward",
    "MultiMarginLossBackward",
    "MultilabelMarginLossBackward",
    "ThnnFused",
    "CudnnRnnBackward",
    "MiopenRnnBackward",
    "MkldnnRnn",
)
"""Starts of the names of nodes whose backward is an operation that torch does not differentiate. Where nothing that
enters it requires grad, that does no harm: then the graph of the result has no dead end."""

_DEAD_ENDS = ("NotImplemented", "CdistBackwardBackward", "PdistBackwardBackward", "EmbeddingBagBackwardBackward")
"""Starts of the names, without their namespace, of nodes that raise when a backward pass reaches them. Not among them:
`WarnNotImplemented`, of operators from outside torch, which warns."""


_PIECES = ("Relu", "LeakyRelu", "Threshold", "Hardtanh", "Clamp", "Abs", "PreluKernel")


def nodes_between(values: Tensor, at: Tensor) -> list[Node]:
    """The nodes that `torch.autograd.grad(values, at)` runs through; none where `values` does not depend on `at`.

    Cost: about 3 us for each node of the graph of `values`.
    """
    return _between([values], [at])


def functions_between(values: Iterable[Tensor], at: Iterable[Tensor]) -> set[type]:
    """The custom functions, not marked `@once_differentiable`, that `torch.autograd.grad(values, at)` runs through."""
    nodes: list[Any] = _between(values, at)
    own = {node._forward_cls for node in nodes if hasattr(node, "_forward_cls") and not _is_once_differentiable(node)}
    return {kind for kind in own if isinstance(kind, type)}


def _between(values: Iterable[Tensor], at: Iterable[Tensor]) -> list[Node]:
    ends = {get_gradient_edge(tensor).node for tensor in at if tensor.requires_grad}
    starts = [tensor.grad_fn for tensor in values if tensor.grad_fn is not None] if ends else []
    parents: dict[Node, list[Node]] = {node: [] for node in starts}
    waiting: list[Node] = list(parents)
    while waiting:
        node = waiting.pop()
        for following, _ in node.next_functions:
            if following is not None:
                if following not in parents:
                    waiting.append(following)
                parents.setdefault(following, []).append(node)
    between: dict[Node, None] = {}
    waiting = [end for end in ends if end in parents]
    while waiting:
        node = waiting.pop()
        if node not in between:
            between[node] = None
            waiting += parents[node]
    return [node for node in between if node not in ends]


def without_second_derivative(nodes: list[Node]) -> list[str]:
    """Names of the nodes of a first pass, as `nodes_between` has them, whose backward torch cannot differentiate."""
    return list(dict.fromkeys(node.name() for node in nodes if node.name().startswith(_LIKELY)))


def obstacles(nodes: list[Node]) -> list[str]:
    """Names of the nodes of a first pass that a second one fails at, or silently leaves out.

    A custom function marked `@once_differentiable` is one. Where nothing that enters its backward requires grad, torch
    does not even raise: the second derivative lacks the function's part.
    """
    found = (node for node in nodes if node.name().startswith(_CERTAIN) or _is_once_differentiable(node))
    return list(dict.fromkeys(node.name() for node in found))


def dead_ends(tensor: Tensor) -> list[str]:
    """Names of the nodes in the graph of `tensor` that will raise when a backward pass reaches them."""
    names = (node.name().rpartition("::")[2] for node in _nodes(tensor))
    return list(dict.fromkeys(name for name in names if name.startswith(_DEAD_ENDS)))


def pieces_of(tensors: Iterable[Tensor]) -> list[str]:
    """Names of the nodes in the graphs of these tensors whose second derivative is zero: of functions in pieces."""
    names = (node.name() for tensor in tensors for node in _nodes(tensor))
    return list(dict.fromkeys(name for name in names if name.startswith(_PIECES)))


def once_differentiable_functions(tensors: Iterable[Tensor]) -> list[str]:
    """Names of the custom functions marked `@once_differentiable` in the graphs of these tensors."""
    nodes: list[Any] = [node for tensor in tensors for node in _nodes(tensor)]
    return list(dict.fromkeys(node._forward_cls.__name__ for node in nodes if _is_once_differentiable(node)))


def _is_once_differentiable(node: Any) -> bool:
    backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
    while backward is not None:
        code = getattr(backward, "__code__", None)
        if code is not None and hasattr(backward, "__wrapped__") and code.co_filename == _MARKER_FILE:
            return True
        backward = getattr(backward, "__wrapped__", None)
    return False


_MARKER_FILE = once_differentiable.__code__.co_filename


def _nodes(tensor: Tensor) -> Iterator[Node]:
    seen: set[Node] = set()
    waiting = [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [following for following, _ in node.next_functions]
