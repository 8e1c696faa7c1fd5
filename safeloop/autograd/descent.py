"""Steps in parameter space for methods that look around before they move: displaced weights, unrolled inner loops."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from safeloop.autograd.norms import each_norm


@contextmanager
def displaced(parameters: Sequence[Tensor], radius: float) -> Iterator[None]:
    """A region in which the parameters stand at `w + radius g / ||g||`, g the present `.grad`: SAM's ascent.

    g is that of all parameters as one vector; without any gradient, or where it is zero, nothing moves. Afterwards,
    also after an exception, each parameter holds what it held, bit for bit; `.grad` is left to the caller.

    Costs a copy of the parameters; no sync.

    Args:
        parameters: those without `.grad` stay where they are.
        radius: how far, in the 2-norm; rho in the paper.

    Source:
        P. Foret, A. Kleiner, H. Mobahi, B. Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving
        Generalization", ICLR 2021, equation 2 with p = 2.
    """
    moved = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [parameter.grad for parameter in moved if parameter.grad is not None]
    before = [parameter.detach().clone() for parameter in moved]
    try:
        if moved:
            norm = torch.linalg.vector_norm(each_norm(gradients))
            scale = torch.where(norm > 0, radius / norm, torch.zeros_like(norm))
            with torch.no_grad():
                for parameter, gradient in zip(moved, gradients, strict=True):
                    parameter.add_(gradient * scale.to(gradient))
        yield
    finally:
        with torch.no_grad():
            for parameter, values in zip(moved, before, strict=True):
                parameter.copy_(values)


def adapt(
    loss: Callable[[dict[str, Tensor]], Tensor],
    parameters: Mapping[str, Tensor],
    *,
    steps: int = 1,
    lr: float,
    first_order: bool = False,
) -> dict[str, Tensor]:
    """Parameters after some steps of gradient descent, as a differentiable function of where they started: MAML.

    `w_0 = parameters`, `w_{k+1} = w_k - lr d loss(w_k) / d w_k`. A loss of the result has the whole way in its graph:
    its gradient with respect to `parameters` has every second derivative, a factor `(1 - lr H)` for each step. No
    `.grad` is written, and the parameters stay as they are.

    Args:
        loss: from parameters by name to a 0-d loss, as with `torch.func.functional_call`.
        parameters: where to start; those that do not require grad are moved too, as constants.
        steps: how many.
        lr: how far.
        first_order: take each step's gradient as a constant (FOMAML): no second derivatives, about half the cost.

    Returns:
        As `parameters`. Cost: a forward and a backward pass for each step, whose graphs are kept together.

    Source:
        C. Finn, P. Abbeel, S. Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", ICML 2017,
        algorithm 1.
    """
    present = {name: w if w.requires_grad else w.detach().requires_grad_() for name, w in parameters.items()}
    with torch.enable_grad():
        for _ in range(steps):
            gradients = torch.autograd.grad(
                loss(present),
                list(present.values()),
                create_graph=not first_order,
                allow_unused=True,
                materialize_grads=True,
            )
            present = {n: w - lr * g for (n, w), g in zip(present.items(), gradients, strict=True)}
    return present
