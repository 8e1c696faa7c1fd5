"""Whether the backward of a custom `torch.autograd.Function` is the derivative of its forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safeloop.seeds import isolated_rng

_STEPS = (1e-4, 2e-4)
_AGREE = 1e-3
"""Two step widths must give one derivative to this accuracy: else the function is not smooth here, and nothing is said"""
_WRONG = 2e-2


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A backward that is not the derivative of its forward."""

    analytic: float
    """the derivative along a random direction, by the backward"""
    numeric: float
    """the same by central differences in float64"""
    ignores_gradient: bool
    """whether the backward gives something although the incoming gradient is zero"""


def check_function(kind: type[torch.autograd.Function], args: Sequence[Any]) -> Disagreement | None:
    """Compare backward and forward of a custom function at these arguments, in float64.

    Nothing is said where the forward is the identity or its numeric derivative vanishes (gradient reversal,
    straight-through estimators, surrogate gradients: there the backward is meant to differ), where it is not smooth, or
    where it cannot be called like this. Random state is left as it is. Cost: six calls.

    Source: the central difference, as in `torch.autograd.gradcheck`, along one random direction.
    """
    with isolated_rng(0), torch._C.DisableTorchFunction():
        try:
            return _compared(lambda values: kind.apply(*values), list(args))  # type: ignore[no-untyped-call]
        except Exception:
            return None


def _compared(function: Callable[[list[Any]], Any], args: list[Any]) -> Disagreement | None:
    places = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point() and a.numel()]
    places = [i for i in places if args[i].requires_grad or args[i].grad_fn is not None] or places
    values = [a.detach().double().clone() if i in places else a for i, a in enumerate(args)]

    def at(shift: float, directions: list[Tensor]) -> Tensor:
        moved = list(values)
        for place, direction in zip(places, directions, strict=True):
            moved[place] = values[place] + shift * direction
        with torch.no_grad():
            return _first(function([m.clone() if isinstance(m, Tensor) else m for m in moved])).double()

    base = at(0.0, [torch.zeros_like(values[i]) for i in places])
    if any(base.shape == values[i].shape and torch.equal(base, values[i]) for i in places):
        return None
    directions = [torch.randn_like(values[i]) for i in places]
    weights = torch.randn_like(base)
    rates = [float(((at(h, directions) - at(-h, directions)) * weights).sum() / (2 * h)) for h in _STEPS]
    scale = max(abs(rates[0]), abs(rates[1]))
    if not scale > 1e-8 or abs(rates[0] - rates[1]) > _AGREE * scale:
        return None
    leaves = [v.clone().requires_grad_() if i in places else v for i, v in enumerate(values)]
    with torch.enable_grad():
        out = _first(function(leaves))
    wanted = [leaves[i] for i in places]
    given = torch.autograd.grad(out, wanted, weights.to(out.dtype), retain_graph=True, allow_unused=True)
    if all(g is None or not bool(g.any()) for g in given):
        return None
    analytic = float(sum((g * d).sum() for g, d in zip(given, directions, strict=True) if g is not None))
    if abs(analytic - rates[0]) <= _WRONG * scale:
        return None
    nothing = torch.autograd.grad(out, wanted, torch.zeros_like(out), allow_unused=True)
    return Disagreement(analytic, rates[0], any(g is not None and bool(g.any()) for g in nothing))


def _first(result: Any) -> Tensor:
    tensor = next(t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, Tensor))
    if not tensor.is_floating_point():
        raise TypeError("no floating-point result")
    return tensor
