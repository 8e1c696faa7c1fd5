"""Operations that have come near the edge of their domain: where a NaN may come from that nobody saw being born."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from safeloop.autograd.sites import Site
from safeloop.autograd.tape import Call
from safeloop.checks.source import at

_MOST = 200
_SHOWN = 4


def _smallest(values: Tensor) -> float:
    return float(values.detach().abs().min())


def _first(call: Call) -> float:
    """How near the first argument comes to zero."""
    return _smallest(call.tensors[0])


def _divisor(call: Call) -> float:
    """How near the divisor comes to zero; a number of the user's own is no suspect."""
    divisor = call.args[1] if len(call.args) > 1 else call.kwargs.get("other")
    return _smallest(divisor) if isinstance(divisor, Tensor) else math.inf


def _power(call: Call) -> float:
    exponent = call.args[1] if len(call.args) > 1 else call.kwargs.get("exponent")
    if isinstance(exponent, (int, float)) and exponent >= 1 and float(exponent).is_integer():
        return math.inf
    return _first(call)


def _result(call: Call) -> float:
    """How near the result comes to zero, where the derivative of a norm or of a spread is not defined."""
    return _smallest(call.out) if isinstance(call.out, Tensor) else math.inf


def _border(call: Call) -> float:
    return float((1 - call.tensors[0].detach().abs()).min())


def _masked(call: Call) -> float:
    """How many entries of the emptiest row are left, in parts of a row; not masked at all is no suspect."""
    values = call.tensors[0].detach()
    hidden = values == -math.inf
    if not values.dim() or not bool(hidden.any()):
        return math.inf
    dim = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else -1)
    return float((~hidden).float().mean(dim=dim if isinstance(dim, int) else -1).min())


_DIVISIONS = ("div", "div_", "__idiv__", "true_divide", "divide")
_MARGINS: dict[str, Callable[[Call], float]] = {
    **dict.fromkeys(("sqrt", "rsqrt", "log", "log2", "log10", "reciprocal", "__rdiv__", "atan2"), _first),
    **dict.fromkeys(_DIVISIONS, _divisor),
    **dict.fromkeys(("pow", "__pow__", "float_power"), _power),
    **dict.fromkeys(("norm", "vector_norm", "linalg_norm", "linalg_vector_norm", "std", "cdist"), _result),
    **dict.fromkeys(("acos", "arccos", "asin", "arcsin", "atanh", "arctanh"), _border),
    **dict.fromkeys(("softmax", "log_softmax", "logsumexp"), _masked),
}
HEARD = frozenset(_MARGINS)


@dataclass(slots=True)
class _Suspect:
    name: str
    site: Site
    margin: float


class Suspects:
    """Remembers the lines at which such operations ran, and how near to the edge each has come."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, Site], _Suspect] = {}

    def hear(self, call: Call) -> None:
        """Note a call, of values that a gradient goes through. Reads the device."""
        out = call.out
        if not isinstance(out, Tensor) or not out.requires_grad or not call.tensors or call.site is None:
            return
        if not out.numel() or not call.tensors[0].is_floating_point():
            return
        margin = _MARGINS[call.name](call)
        if not math.isfinite(margin):
            return
        key = call.name, call.site
        known = self._known.get(key)
        if known is not None:
            known.margin = min(known.margin, margin)
        elif len(self._known) < _MOST:
            self._known[key] = _Suspect(call.name.strip("_"), call.site, margin)

    def text(self) -> str:
        """The nearest ones with their lines; empty for none."""
        near: Sequence[Any] = sorted(self._known.values(), key=lambda suspect: suspect.margin)
        return "; ".join(f"`{one.name}`, {at(one.site, '')}" for one in near[:_SHOWN])
