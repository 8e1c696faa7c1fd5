"""Derivatives of a net's output with respect to its inputs, for losses that are differential equations."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from safeloop.checks.source import Place
from safeloop.checks.terms.derivatives import DerivativeVanishes, NothingToDerive
from safeloop.faults import FaultError

Key: TypeAlias = "int | str | tuple[int | str, ...]"

_seen_on_device: set[tuple[str, int]] = set()
"""Lines whose second derivatives were looked at on a device where looking waits for it: once each."""


class Derivatives:
    """Partial derivatives of `u`, each computed when it is first asked for, all from one graph; see `derivatives`."""

    def __init__(self, u: Tensor, at: Mapping[str, Tensor], *, may_vanish: bool, place: Place) -> None:
        self._names = list(at)
        self._coordinates = list(at.values())
        self._shape = u.shape
        self._may_vanish = may_vanish
        self._place = place
        self._known: dict[tuple[int, ...], Tensor] = {(): u}
        self._require_graph(u)

    def __getitem__(self, key: Key) -> Tensor:
        """`d[0]` or `d["x"]` for u_x, `d[0, 1]` or `d["x", "t"]` for u_xt: in the shape of u, with a graph."""
        parts = key if isinstance(key, tuple) else (key,)
        return self._of(tuple(sorted(map(self._index, parts))))

    def __getattr__(self, names: str) -> Tensor:
        """`d.xt` for u_xt, where all names have one letter."""
        if names.startswith("_") or not all(name in self._names for name in names):
            raise AttributeError(f"no derivative `{names}`: the coordinates are {', '.join(self._names)}")
        return self[tuple(names)]

    def _index(self, part: int | str) -> int:
        if isinstance(part, str) and part in self._names:
            return self._names.index(part)
        if isinstance(part, int) and 0 <= part < len(self._names):
            return part
        raise KeyError(f"no coordinate {part!r}: they are {', '.join(self._names)}")

    def _of(self, key: tuple[int, ...]) -> Tensor:
        if key not in self._known:
            lower = self._of(key[:-1])
            for index, value in enumerate(self._all_of(lower, len(key))):
                self._known.setdefault(tuple(sorted((*key[:-1], index))), value)
        found = self._known[key]
        if len(key) > 1 and not self._may_vanish:
            self._refuse_nothing(found, key)
        return found

    def _all_of(self, lower: Tensor, order: int) -> list[Tensor]:
        """The derivatives of a tensor with respect to every coordinate, in the shape of u."""
        if not lower.requires_grad:
            return [torch.zeros_like(lower)] * len(self._names)
        with torch.enable_grad():
            try:
                found: Sequence[Tensor | None] = torch.autograd.grad(
                    lower, self._coordinates, torch.ones_like(lower), create_graph=True, allow_unused=True
                )
            except RuntimeError as error:
                if "does not require grad" in str(error):  # the graph holds parameters only
                    return [torch.zeros_like(lower)] * len(self._names)
                raise
        if order == 1 and (idle := [n for n, one in zip(self._names, found, strict=True) if one is None]):
            raise self._nothing(
                f"u does not depend on `{idle[0]}`",
                "the net was called with other tensors: a detached copy, or columns cut out too early",
                f"compute u from the very `{idle[0]}` that stands in `at`",
            )
        return [torch.zeros_like(lower) if one is None else one.reshape(self._shape) for one in found]

    def _require_graph(self, u: Tensor) -> None:
        wrong = [n for n, one in zip(self._names, self._coordinates, strict=True) if not one.requires_grad]
        if wrong:
            raise self._nothing(
                f"`{wrong[0]}` does not require grad",
                "autograd keeps no path to a tensor that did not require grad when u was computed",
                f"call `{wrong[0]}.requires_grad_()` before the net is called",
            )
        if not u.requires_grad:
            raise self._nothing(
                "u has no graph",
                "it was computed without grad mode, or detached",
                "compute u with grad mode on; mark a `metrics` that takes derivatives with `@sl.needs_grad`",
            )

    def _refuse_nothing(self, found: Tensor, key: tuple[int, ...]) -> None:
        if found.device.type != "cpu":
            line = (self._place.path, self._place.line)
            if line in _seen_on_device:
                return
            _seen_on_device.add(line)
        if found.numel() and not bool(found.detach().any()):
            name = "u_" + "".join(self._names[i] for i in key)
            raise DerivativeVanishes.error(
                f"`{name}` is exactly 0 at all {found.numel()} points",
                where=str(self._place),
                why="the net is piecewise linear in its inputs, as with ReLU: its second derivatives are 0 wherever "
                "they exist, and the term that holds them trains nothing",
                fix="use a smooth activation (nn.Tanh, nn.SiLU, nn.GELU, torch.sin); where u is rightly linear, "
                "`sl.derivatives(..., may_vanish=True)`",
            )

    def _nothing(self, what: str, why: str, fix: str) -> FaultError:
        return NothingToDerive.error(what, where=str(self._place), why=why, fix=fix)


def derivatives(u: Tensor, at: Sequence[Tensor] | Mapping[str, Tensor], *, may_vanish: bool = False) -> Derivatives:
    """Partial derivatives of a net's output at its inputs, sample by sample: u_x, u_t, u_xx, u_xt, ...

    ```python
    x, t = x.requires_grad_(), t.requires_grad_()
    u = net(torch.cat([x, t], 1))
    d = sl.derivatives(u, at={"x": x, "t": t})
    residual = d.t + u * d.x - nu * d.xx            # at=(x, t): d[1] + u * d[0] - nu * d[0, 0]
    ```

    Each is computed when it is first asked for and kept; those of one order that share all but the last coordinate come
    from one backward pass, and the order of coordinates makes no difference. Every result has a graph of its own, so
    that a loss of it trains the net.

    A sample's derivative is that of its own output: samples must not influence each other, as they do in batch
    normalisation in train mode.

    Args:
        u: `[N]` or `[N, 1]`.
        at: the coordinates, each `[N]` or `[N, 1]`, that u was computed from: a sequence, or a mapping that names them.
        may_vanish: whether a second or higher derivative may be exactly 0 everywhere. Looking costs one pass over the
            values on the CPU; on other devices it waits for the device, once for each line of code that calls this.

    Returns:
        What is indexed by position or name, `d[0, 0]`, `d["x", "x"]`, or, with names of one letter, has attributes,
        `d.xx`: tensors in the shape of u.

    Raises:
        FaultError: SL446, a coordinate does not require grad, or u does not depend on it; SL445, a second or higher
            derivative is exactly 0 everywhere.
        ValueError: u or a coordinate has another shape.
    """
    named = dict(at) if isinstance(at, Mapping) else {str(i): one for i, one in enumerate(at)}
    if not named:
        raise ValueError("`at` names no coordinate")
    for name, one in {"u": u, **named}.items():
        if one.dim() not in (1, 2) or (one.dim() == 2 and one.shape[1] != 1) or len(one) != len(u):
            raise ValueError(f"`{name}` has the shape {list(one.shape)}; it must be [N] or [N, 1], the same N for all")
    return Derivatives(u, named, may_vanish=may_vanish, place=_caller())


def _caller() -> Place:
    """The nearest line that is not safeloop's own."""
    own = os.path.dirname(os.path.abspath(__file__)) + os.sep
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(own):
        frame = frame.f_back
    return Place(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
