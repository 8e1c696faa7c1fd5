"""Gradients that are looked for where there are none."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck
from safeloop.checks.source import at
from safeloop.faults import Fault


class GradientOfNonLeaf(CallCheck):
    """The gradient of a tensor is read that is no leaf, so that it has none.

    ## Source
    https://github.com/pytorch/pytorch/issues/140469; documentation of `torch.Tensor.is_leaf`.
    """

    code = "SL315"
    title = "gradient of a tensor that is no leaf"
    hears = frozenset((".grad",))

    def __init__(self) -> None:
        self._told: set[str] = set()

    def hear(self, call: Call) -> Iterator[Fault]:
        """Where a line of the user's reads `.grad` of the result of an operation, and gets None."""
        tensor = call.args[0]
        if call.out is not None or not call.is_direct or not isinstance(tensor, Tensor) or tensor.grad_fn is None:
            return
        place = at(call.site, "a line")
        if place in self._told:
            return
        self._told.add(place)
        origin = call.tape.origins.get(tensor.grad_fn._sequence_nr())
        made = f"; it was made at {at(origin.site, origin.name)}" if origin is not None else ""
        yield self.fault(
            f"`.grad` of a tensor of shape {list(tensor.shape)} is None: it is the result of `{tensor.grad_fn.name()}`, "
            "not a leaf",
            where=place + made,
            why="backward() fills `.grad` of leaves only. An update such as `w = w - lr * w.grad` binds the name to a new "
            "tensor that is no leaf, and the parameter itself is never changed",
            fix="update in place under `with torch.no_grad(): w -= lr * w.grad`, or use an optimizer; for an "
            "intermediate value call `retain_grad()` before backward()",
        )
