"""Products with Jacobians and Hessians, none of which is ever formed: vjp, jvp, hvp, Gauss-Newton.

Every function takes what it differentiates as a tensor that has its graph, or as a function of no arguments that makes
one, and the parameters as a module (those that require grad) or as a mapping of names to tensors. Given a tensor, its
graph is kept for the caller; given a function, the graph goes with the call, its random draws leave the global state as
it was, and the module's buffers are put back. Nothing writes a `.grad`, a mode or a parameter. What a result does not
depend on is zero, never missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

from safeloop.seeds import isolated_rng

Function: TypeAlias = "Tensor | Callable[[], Tensor]"
"""A tensor with its graph, or what makes one."""

Named: TypeAlias = "Mapping[str, Tensor]"
Parameters: TypeAlias = "nn.Module | Mapping[str, Tensor]"
"""A module stands for its parameters that require grad."""


def vjp(output: Function, parameters: Parameters, vector: Tensor) -> dict[str, Tensor]:
    """The vector-Jacobian product `J^T v`, J the Jacobian of `output` with respect to the parameters.

    Args:
        output: of any shape.
        parameters: what it is differentiated with respect to.
        vector: as `output`.

    Returns:
        As the parameters. Cost: one backward pass.
    """
    named = trainable(parameters)
    with graph_of(output, parameters) as root:
        return dict(zip(named, _grad([root], list(named.values()), [vector], keeps=True), strict=True))


def jvp(output: Function, parameters: Parameters, vector: Named) -> Tensor:
    """The Jacobian-vector product `J v`: how `output` moves when the parameters move along `v`.

    `J v = d/du <J^T u, v>`, so that it works on a graph that is there; operations need a second derivative.

    Args:
        output: of any shape.
        parameters: what it is differentiated with respect to.
        vector: as the parameters, by name.

    Returns:
        As `output`. Cost: two backward passes.

    Raises:
        ValueError: `vector` does not fit the parameters.
    """
    named = trainable(parameters)
    along = aligned(vector, named)
    with graph_of(output, parameters) as root, torch.enable_grad():
        seed = torch.zeros_like(root).requires_grad_()
        rows = _grad([root], list(named.values()), [seed], keeps=True, create_graph=True)
        return _grad(rows, [seed], along, keeps=False)[0]


def hvp(loss: Function, parameters: Parameters, vector: Named) -> dict[str, Tensor]:
    """The Hessian-vector product `H v` of a 0-d loss, by a backward pass through the gradient.

    Args:
        loss: 0-d.
        parameters: what it is differentiated with respect to.
        vector: as the parameters, by name.

    Returns:
        As the parameters. Cost: about 4 gradients with the forward (`benchmarks/products.py`); for several vectors,
        `HessianProducts` makes the graph of the gradient once.

    Raises:
        ValueError: the loss is not 0-d, or `vector` does not fit the parameters.

    Source:
        B. A. Pearlmutter, "Fast Exact Multiplication by the Hessian", Neural Computation 6 (1994).
    """
    named = trainable(parameters)
    along = aligned(vector, named)
    with HessianProducts(loss, parameters) as product:
        return dict(zip(named, product(along, is_last=True), strict=True))


def gauss_newton_product(
    output: Function, loss_of: Callable[[Tensor], Tensor], parameters: Parameters, vector: Named
) -> dict[str, Tensor]:
    """The product with the generalised Gauss-Newton matrix `J^T H_L J v`.

    J is the Jacobian of `output` z with respect to the parameters, `H_L` the Hessian of `loss_of(z)` with respect to z.
    For a loss that is convex in z it is positive semi-definite, and equal to the Hessian where J is constant.

    Args:
        output: what the loss is a function of, of any shape.
        loss_of: from `output` to a 0-d loss.
        parameters: what it is differentiated with respect to.
        vector: as the parameters, by name.

    Returns:
        As the parameters. Cost: three backward passes through the model, two through the loss.

    Raises:
        ValueError: the loss is not 0-d, or `vector` does not fit the parameters.

    Source:
        N. N. Schraudolph, "Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent", Neural Computation
        14 (2002), section 3.
    """
    with graph_of(output, parameters) as root:
        forward = jvp(root, parameters, vector)
        with torch.enable_grad():
            point = root.detach().requires_grad_()
            loss = loss_of(point)
        curved = hvp(loss, {"output": point}, {"output": forward})["output"]
        return vjp(root, parameters, curved)


class HessianProducts:
    """`H v` for many v, from one graph of the gradient; use it in a `with`, which lets the graph go.

    The products are of lists in the order of `names`. Cost: a forward and a backward pass that records itself when it
    is entered, then about two gradients for each product; the graph of the gradient is kept in between.

    Args:
        loss: 0-d.
        parameters: what it is differentiated with respect to.

    Raises:
        ValueError: the loss is not 0-d.
    """

    def __init__(self, loss: Function, parameters: Parameters) -> None:
        self._loss = loss
        self._parameters = parameters
        named = trainable(parameters)
        self.names = list(named)
        self.tensors = list(named.values())
        self.gradient: list[Tensor] = []
        """of the loss, in the order of `names`, with its graph"""

    def __enter__(self) -> HessianProducts:
        self._region = graph_of(self._loss, self._parameters)
        root = self._region.__enter__()
        try:
            if root.dim() != 0:
                raise ValueError(f"a Hessian is that of a 0-d loss, and this one has the shape {list(root.shape)}")
            with torch.enable_grad():
                self.gradient = _grad([root], self.tensors, None, keeps=True, create_graph=True)
        except BaseException:
            self._region.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.gradient = []
        self._region.__exit__(None, None, None)

    def __call__(self, vector: Sequence[Tensor], *, is_last: bool = False) -> list[Tensor]:
        """One product; `is_last` lets go of what only the graph of the gradient holds."""
        keeps = not is_last or isinstance(self._loss, Tensor)
        return _grad(self.gradient, self.tensors, vector, keeps=keeps)


def trainable(parameters: Parameters) -> dict[str, Tensor]:
    """What is differentiated with respect to, by name.

    Raises:
        ValueError: nothing, or a tensor that does not require grad.
    """
    if isinstance(parameters, nn.Module):
        named: dict[str, Tensor] = {n: p for n, p in parameters.named_parameters() if p.requires_grad}
    else:
        named = dict(parameters)
    if not named:
        raise ValueError("there is no parameter that requires grad")
    if fixed := [name for name, tensor in named.items() if not tensor.requires_grad]:
        raise ValueError(f"`{fixed[0]}` does not require grad")
    return named


def aligned(vector: Named, named: Named) -> list[Tensor]:
    """The parts of a vector in the order of the parameters.

    Raises:
        ValueError: a name is missing or unknown, or a shape is another.
    """
    if missing := [name for name in named if name not in vector]:
        raise ValueError(f"the vector has no part for `{missing[0]}`")
    if strangers := [name for name in vector if name not in named]:
        raise ValueError(f"the vector has a part for `{strangers[0]}`, which is no parameter")
    for name, tensor in named.items():
        if vector[name].shape != tensor.shape:
            raise ValueError(
                f"the vector's `{name}` has the shape {list(vector[name].shape)}, not {list(tensor.shape)}"
            )
    return [vector[name] for name in named]


@contextmanager
def graph_of(function: Function, parameters: Parameters) -> Iterator[Tensor]:
    """A region with the tensor that a function makes; random state and buffers are afterwards as before."""
    if isinstance(function, Tensor):
        yield function
        return
    buffers = list(parameters.buffers()) if isinstance(parameters, nn.Module) else []
    copies = [buffer.detach().clone() for buffer in buffers]
    with isolated_rng():
        try:
            with torch.enable_grad():
                yield function()
        finally:
            with torch.no_grad():
                for buffer, copy in zip(buffers, copies, strict=True):
                    if not torch.equal(buffer, copy):
                        buffer.copy_(copy)


def _grad(
    roots: Sequence[Tensor],
    inputs: Sequence[Tensor],
    seeds: Sequence[Tensor] | None,
    *,
    keeps: bool,
    create_graph: bool = False,
) -> list[Tensor]:
    """`torch.autograd.grad`, zeros where there is no path; roots that depend on nothing are left out."""
    chosen = [i for i, root in enumerate(roots) if root.requires_grad]
    if not chosen:
        return [torch.zeros_like(tensor) for tensor in inputs]
    return list(
        torch.autograd.grad(
            [roots[i] for i in chosen],
            inputs,
            None if seeds is None else [seeds[i] for i in chosen],
            retain_graph=keeps,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
    )
