"""Gradients that are looked for where there are none."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor

from safeloop.autograd.lineage import Mark
from safeloop.autograd.numbers import number_of
from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck
from safeloop.checks.source import at, place_of
from safeloop.faults import Fault

_ASKS = re.compile(r"\bNone\b|\b(get|has)attr\b|\bif\b.*\.grad\b|\.grad\s*(or|and)\b")
"""A line that reckons with None."""
_USES = re.compile(r"[-+*/@]\s*[\w.\[\]]*\.grad\b|\.grad\s*([-+*/@.\[]|\)\s*[-+*/@])")
"""A line that computes with the gradient, which must fail."""
_SUMS = frozenset(("sub", "__sub__", "subtract", "add", "__add__"))
_GRADIENT = "read from .grad"
_KEPT = 2000


class GradientOfNonLeaf(CallCheck):
    """The gradient of a tensor is read that is no leaf, so that it has none.

    ## What it does
    Tells where a line of the user's reads `.grad` of the result of an operation after a backward pass, and gets None.
    Lines that ask first (`if x.grad is None`, `getattr(x, "grad", None)`) are not told, unless the tensor is a weight
    that was updated by hand in an earlier iteration, and is a new tensor since: `w - lr * w.grad`. Cost: none beyond
    the tape of calls.

    ## Why it is bad
    backward() fills `.grad` of leaves only. An update such as `w = w - lr * w.grad` binds the name to a new tensor
    that is no leaf: the next `.grad` is None, and the parameter itself is never changed. `.to(device)` and `* 0.1` of
    a leaf are no leaves either.

    ## Bad
    ```python
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.audit(model=model, optimizers=optimizer, on_fault="raise") as audit:
        hidden = model[0](torch.randn(8, 4))
        model[1](hidden).square().mean().backward()
        slopes = hidden.grad.abs()
        optimizer.step()
    ```
    ## Good
    ```python
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.audit(model=model, optimizers=optimizer, on_fault="raise") as audit:
        hidden = model[0](torch.randn(8, 4))
        hidden.retain_grad()
        model[1](hidden).square().mean().backward()
        slopes = hidden.grad.abs()
        optimizer.step()
    ```
    ## Fix
    Update in place under `with torch.no_grad(): w -= lr * w.grad`, or use an optimizer. For an intermediate value call
    `retain_grad()` before backward(), or use `torch.autograd.grad`.

    ## Source
    https://github.com/pytorch/pytorch/issues/140469; documentation of `torch.Tensor.is_leaf`.
    """

    code = "SL315"
    title = "gradient of a tensor that is no leaf"
    hears = _SUMS | {".grad"}

    def __init__(self) -> None:
        self._told: set[str] = set()
        self._updated: dict[int, str] = {}
        """nodes of weights that were updated by hand -> the line"""

    def hear(self, call: Call) -> Iterator[Fault]:
        """Where a line of the user's reads `.grad` of the result of an operation, and gets None."""
        if call.name in _SUMS:
            self._note(call)
            return
        tensor = call.args[0]
        if call.is_direct and isinstance(call.out, Tensor):
            call.tape.mark(call.out, Mark(_GRADIENT, call.name, "", None, "", 0))
        if call.out is not None or not call.is_direct or not isinstance(tensor, Tensor) or tensor.grad_fn is None:
            return
        place = at(call.site, "a line")
        line = place_of(call.site)
        text = "" if line is None else line.text
        number = number_of(tensor.grad_fn)
        updated = (
            self._updated.get(number) if number < call.tape.first_node else None
        )  # else: fast weights, for a while
        if place in self._told or (_ASKS.search(text) and updated is None):
            return
        self._told.add(place)
        origin = call.tape.origins.get(number)
        made = updated or ("" if origin is None else at(origin.site, origin.name))
        yield self.fault(
            f"`.grad` of a tensor of shape {list(tensor.shape)} is None: it is the result of "
            f"`{tensor.grad_fn.name()}`, "
            "not a leaf",
            where=place + (f"; it was made at {made}" if made else ""),
            why="backward() fills `.grad` of leaves only. An update such as `w = w - lr * w.grad` binds "
            "the name to a new "
            "tensor that is no leaf, and the parameter itself is never changed",
            fix="update in place under `with torch.no_grad(): w -= lr * w.grad`, or use an optimizer; for an "
            "intermediate value call `retain_grad()` before backward()",
            severity="error" if updated or _USES.search(text) else "warning",
        )

    def _note(self, call: Call) -> None:
        """Remember what is made of a weight that is a leaf, and its gradient."""
        out, tensors = call.out, call.tensors
        if len(tensors) != 2 or not isinstance(out, Tensor) or out.grad_fn is None:
            return
        weight, change = tensors
        if not weight.is_leaf or not weight.requires_grad or change.requires_grad:
            return
        if any(mark.kind == _GRADIENT for mark in call.tape.marks_of(change)):
            if len(self._updated) > _KEPT:
                self._updated.clear()
            self._updated[number_of(out.grad_fn)] = at(call.site, call.name)
