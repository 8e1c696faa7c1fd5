"""Whether the backward of a custom `torch.autograd.Function` is the derivative of its forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safeloop.seeds import isolated_rng

_STEPS = (1e-4, 2e-4)
_AGREE = 1e-3
"""Two step widths must give one derivative to this accuracy: else the function is not smooth here."""
_WRONG = 2e-2
_MOST = 1 << 22
"""Arguments with more entries are not copied into float64."""
_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size)


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A backward that is not the derivative of its forward."""

    analytic: float
    """the derivative along a random direction, by the backward"""
    numeric: float
    """the same by central differences in float64"""
    ignores_gradient: bool
    """whether the backward gives the same whatever gradient comes in"""
    only_at_other_than_one: bool = False
    """whether it is right where the incoming gradient is one, as it is for a loss that nothing multiplies"""


def check_function(kind: type[torch.autograd.Function], args: Sequence[Any]) -> Disagreement | None:
    """Compare backward and forward of a custom function at these arguments, in float64.

    Many backwards differ from the derivative on purpose, and nothing is said of them: the forward is the identity
    (gradient reversal and scaling), has flat parts or jumps (straight-through estimators, quantisers, surrogate
    gradients), or the backward is not linear (a clipped or guided gradient, an added penalty). Nor of functions that
    are not smooth here, that take modules or callables or more than 4 million values, or that run on several ranks,
    where calling them again may have effects. A scalar whose backward ignores the incoming gradient, and is right where
    that is one, is given as `only_at_other_than_one`. Random state is left as it is. Cost: about twenty calls, once
    for each class.

    Source: the central difference, as in `torch.autograd.gradcheck`, along one random direction.
    """
    return _probed(_compared, kind, args)


def check_twice(kind: type[torch.autograd.Function], args: Sequence[Any]) -> Disagreement | None:
    """Compare what a double backward of a custom function gives with central differences of its backward.

    Only for a function whose backward is the derivative of its forward here; under the conditions of `check_function`.
    """
    return _probed(_compared_twice, kind, args)


def _probed(
    compare: Callable[[_Probe], Disagreement | None], kind: type[torch.autograd.Function], args: Sequence[Any]
) -> Disagreement | None:
    tensors = [a for a in args if isinstance(a, Tensor)]
    if not tensors or sum(t.numel() for t in tensors) > _MOST or not all(map(_is_plain, args)) or _has_peers():
        return None
    off = torch.autocast(tensors[0].device.type, enabled=False)
    with isolated_rng(0), torch._C.DisableTorchFunction(), off:
        try:
            return compare(_Probe(kind, args))
        except Exception:  # a function that cannot be called like this, such as a kernel without float64
            return None


class _Probe:
    """A custom function at fixed arguments, in float64."""

    def __init__(self, kind: type[torch.autograd.Function], args: Sequence[Any]) -> None:
        floats = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point() and a.numel()]
        self.places = [i for i in floats if args[i].requires_grad] or floats
        self.values = [a.detach().double() if i in floats else a for i, a in enumerate(args)]  # of one dtype
        self._kind = kind

    def _arguments(self, shifts: Sequence[Tensor]) -> list[Any]:
        values = [v.detach().clone() if isinstance(v, Tensor) else v for v in self.values]
        for place, shift in zip(self.places, shifts, strict=False):
            values[place] = values[place] + shift
        return values

    def forward(self, shifts: Sequence[Tensor] = ()) -> Tensor:
        """The first result, where the differentiated arguments are moved by `shifts`."""
        with torch.no_grad():
            return _first(self._kind.apply(*self._arguments(shifts))).double()  # type: ignore[no-untyped-call]

    def backward(self, weights: Tensor, shifts: Sequence[Tensor] = ()) -> list[Tensor]:
        """What the backward gives for an incoming gradient, zeros where it gives none; on a graph of its own."""
        wanted, given = self._differentiated(weights, shifts, is_twice=False)
        return [torch.zeros_like(v) if g is None else g.double() for v, g in zip(wanted, given, strict=True)]

    def double_backward(self, weights: Tensor, along: Sequence[Tensor], directions: Sequence[Tensor]) -> float:
        """How the backward's result `along` some tensors changes in a direction, by differentiating it."""
        with torch.enable_grad():
            wanted, given = self._differentiated(weights, (), is_twice=True)
            sums = [(g * a).sum() for g, a in zip(given, along, strict=True) if g is not None and g.requires_grad]
        if not sums:
            return 0.0
        second: Sequence[Tensor | None] = torch.autograd.grad(sums, wanted, allow_unused=True)
        return float(sum((s * d).sum() for s, d in zip(second, directions, strict=True) if s is not None))

    def _differentiated(
        self, weights: Tensor, shifts: Sequence[Tensor], *, is_twice: bool
    ) -> tuple[list[Tensor], Sequence[Tensor | None]]:
        values = self._arguments(shifts)
        wanted = [values[place].requires_grad_() for place in self.places]
        with torch.enable_grad():
            for place, leaf in zip(self.places, wanted, strict=True):
                values[place] = leaf.clone()  # the forward may write into it
            out = _first(self._kind.apply(*values))  # type: ignore[no-untyped-call]
        weights = weights.to(out.dtype)
        return wanted, torch.autograd.grad(out, wanted, weights, allow_unused=True, create_graph=is_twice)


def _compared(probe: _Probe) -> Disagreement | None:
    base = probe.forward()
    originals = [probe.values[place] for place in probe.places]
    if any(v.numel() == base.numel() and torch.equal(v.flatten(), base.flatten()) for v in originals):
        return None
    weights = torch.ones_like(base) if base.numel() == 1 else torch.randn_like(base)
    given = probe.backward(weights)
    ignores = _ignores(probe, weights, given)
    if ignores is None:
        return None
    directions = [torch.randn_like(v) * bool(g.any()) for v, g in zip(originals, given, strict=True)]
    moved = _moved(probe, directions)
    if moved is None:
        return None
    weights = weights * moved
    rates = [_rate(probe, directions, weights, h) for h in _STEPS]
    scale = max(map(abs, rates))
    if not all(map(math.isfinite, rates)) or scale <= 1e-8 or abs(rates[0] - rates[1]) > _AGREE * scale:
        return None
    pairs = zip(probe.backward(weights), directions, strict=True)
    analytic = float(sum((g * d).sum() for g, d in pairs))
    is_right = abs(analytic - rates[0]) <= _WRONG * scale
    if not math.isfinite(analytic) or (is_right and not (ignores and base.numel() == 1)) or _jumps(probe, originals):
        return None
    return Disagreement(analytic, rates[0], ignores, is_right)


def _compared_twice(probe: _Probe) -> Disagreement | None:
    weights = torch.randn_like(probe.forward())
    given = probe.backward(weights)
    directions, along = ([torch.randn_like(g) for g in given] for _ in range(2))
    first = [_rate(probe, directions, weights, h) for h in _STEPS]
    analytic = float(sum((g * d).sum() for g, d in zip(given, directions, strict=True)))
    if abs(analytic - first[0]) > _AGREE * max(map(abs, first)) or abs(first[0] - first[1]) > _AGREE * abs(first[0]):
        return None
    rates = []
    for h in _STEPS:
        ahead, behind = (probe.backward(weights, [s * d for d in directions]) for s in (h, -h))
        rates.append(float(sum(((a - b) * o).sum() for a, b, o in zip(ahead, behind, along, strict=True)) / (2 * h)))
    scale = max(map(abs, rates))
    if not all(map(math.isfinite, rates)) or scale <= 1e-6 or abs(rates[0] - rates[1]) > _AGREE * scale:
        return None
    twice = probe.double_backward(weights, along, directions)
    is_right = not math.isfinite(twice) or abs(twice - rates[0]) <= _WRONG * scale
    return None if is_right else Disagreement(twice, rates[0], ignores_gradient=False)


def _ignores(probe: _Probe, weights: Tensor, given: list[Tensor]) -> bool | None:
    """Whether the backward does not use the incoming gradient; None where it is not linear in it."""
    nothing = probe.backward(torch.zeros_like(weights))
    if any(bool(g.any()) for g in nothing):
        return True if all(map(torch.allclose, given, nothing)) else None
    return False if _is_linear(probe, weights, given) else None


def _is_linear(probe: _Probe, weights: Tensor, given: list[Tensor]) -> bool:
    """Whether the backward is a linear map, which the derivative of anything is."""
    other = torch.randn_like(weights)
    sums = probe.backward(weights - 2 * other)
    return all(
        torch.allclose(s, g - 2 * o, rtol=1e-4, atol=1e-4 * float(g.abs().max() + o.abs().max()))
        for s, g, o in zip(sums, given, probe.backward(other), strict=True)
    )


def _moved(probe: _Probe, directions: list[Tensor]) -> Tensor | None:
    """Which results move with the arguments; None where an argument with a gradient moves none of them."""
    moved = None
    for i, direction in enumerate(directions):
        if bool(direction.any()):
            alone = [d * _STEPS[0] if j == i else torch.zeros_like(d) for j, d in enumerate(directions)]
            changed = probe.forward(alone) != probe.forward([-d for d in alone])
            if not bool(changed.any()):
                return None
            moved = changed if moved is None else moved | changed
    return moved


def _rate(probe: _Probe, directions: list[Tensor], weights: Tensor, h: float) -> float:
    ahead, behind = (probe.forward([s * d for d in directions]) for s in (h, -h))
    change = torch.where(weights != 0, (ahead - behind) * weights, 0.0)
    return float(change.sum() / (2 * h))


def _jumps(probe: _Probe, originals: list[Tensor], coarse: int = 16, finer: int = 8) -> bool:
    """Whether the forward jumps on a line to the same values in another order: steps 8 times finer stay as large."""
    ways = [v.flatten()[torch.randperm(v.numel(), device=v.device)].view_as(v) - v for v in originals]

    def largest(count: int) -> float:
        line = [probe.forward([t / count * way for way in ways]) for t in range(count + 1)]
        steps = (a - b for a, b in zip(line[1:], line[:-1], strict=True))
        return max(float(s.nan_to_num(0.0, 0.0, 0.0).abs().max()) for s in steps)

    return largest(coarse * finer) > 0.5 * largest(coarse)


def _first(result: Any) -> Tensor:
    tensor = next(t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, Tensor))
    if not tensor.is_floating_point():
        raise TypeError("no floating-point result")
    return tensor


def _is_plain(value: Any) -> bool:
    """Whether a value holds no state of somebody else's that another call could change."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value)) and not any(isinstance(v, Tensor) for v in value)
    return isinstance(value, (Tensor, *_PLAIN))


def _has_peers() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
