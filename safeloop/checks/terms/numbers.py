"""Parts of a loss that were turned into Python numbers before they were added."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import Tensor

from safeloop.autograd.numbers import number_of
from safeloop.autograd.sites import Site, call_text, site_of
from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck
from safeloop.checks.source import at
from safeloop.checks.terms.constants import ADDS, parts_of, summands
from safeloop.checks.wording import listed
from safeloop.faults import Fault

_ESCAPES = frozenset(("item", "__float__", "tolist", "numpy"))
_MOST = 64
"""Numbers that are remembered between two backward passes."""
_TIMES = 3
_KEPT = 2000
"""Nodes of scalars that were differentiated which are remembered."""


@dataclass(frozen=True, slots=True)
class _Number:
    """A Python number that was computed from parameters, and that a loss might contain."""

    site: Site | None
    names: tuple[str, ...]
    node: int | None
    """the node of the scalar that it was"""


class NumberInLoss(CallCheck):
    """A part of the loss was turned into a Python number by `.item()` before it was added.

    ## What it does
    Notes the Python numbers that scalars with a path to parameters are turned into, and sums of a scalar with a graph
    and a Python number: the number is one of those, or is computed from variables one of which holds one of those, as
    in `loss + beta * number`. Told where the loss that is differentiated contains the sum, three times. A factor that
    is such a number, one of an earlier pass, and one whose tensor another pass differentiates are left alone. Cost:
    none beyond the tape of calls.

    ## Why it is bad
    The part is in the loss that is logged and trains nothing: `.item()` frees the graph, which looks like a cure for a
    memory leak. Where another part reaches the same parameters, no gradient is missing, so that nothing else shows it.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            out = self.model(batch)
            size = out.square().mean().item()
            return F.mse_loss(out, batch) + 0.1 * size

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 4), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 3}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            out = self.model(batch)
            size = out.square().mean()
            return F.mse_loss(out, batch) + 0.1 * size

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 4), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 3}).fit()
    ```
    ## Fix
    Add the tensor, and take `.item()` of it for the log only.

    ## Source
    https://github.com/guopengf/FL-MRCM/issues/10.
    """

    code = "SL463"
    title = "part of the loss is a Python number"
    severity = "warning"
    hears = ADDS | _ESCAPES

    def __init__(self) -> None:
        self._numbers: dict[float, _Number] = {}
        self._sums: dict[int, tuple[_Number, Site | None]] = {}
        """the node of a sum -> the number in it, and the line that added it"""
        self._times: Counter[Site | None] = Counter()
        self._differentiated: set[Site | None] = set()
        """lines that made numbers of what a backward pass differentiates"""
        self._past: set[int] = set()
        """the nodes of scalars that backward passes have differentiated"""
        self._waiting: dict[int, Site | None] = {}
        """the nodes of scalars whose numbers a loss contains, which a later pass may differentiate"""

    def hear(self, call: Call) -> Iterator[Fault]:
        """Note numbers that were tensors, and sums with one of them."""
        if call.name in _ESCAPES:
            self._escaped(call)
        elif self._numbers and isinstance(call.out, Tensor) and not call.out.dim() and call.out.grad_fn is not None:
            added = [arg for arg in call.args[:2] if isinstance(arg, float)]
            if len(added) == 1 and call.frame is not None:
                number = self._number_in(added[0], call.frame)
                if number is not None:
                    self._sums[number_of(call.out.grad_fn)] = number, call.site
        return iter(())

    def summed(self, roots: Iterable[Tensor]) -> Iterator[Fault]:
        """The faults of losses that are about to be differentiated."""
        roots = list(roots)
        parts = {number for root in roots for number in parts_of(root)}
        self._differentiated |= {number.site for number in self._numbers.values() if number.node in parts}
        self._differentiated |= {site for node, site in self._waiting.items() if node in parts}
        self._waiting.clear()
        self._past = (self._past if len(self._past) < _KEPT else set()) | parts
        found = [self._sums[number] for number in summands(roots) if number in self._sums]
        for number, place in dict.fromkeys(found):
            self._times[number.site] += 1
            self._waiting |= {} if number.node is None else {number.node: number.site}
            if self._times[number.site] == _TIMES and number.site not in self._differentiated:
                yield self._told(number, place)
        self._numbers.clear()
        self._sums.clear()

    def _escaped(self, call: Call) -> None:
        tensor = call.tensors[0] if call.tensors else None
        if tensor is None or tensor.numel() != 1 or len(self._numbers) >= _MOST:
            return
        cuts = [mark for mark in call.tape.marks_of(tensor) if mark.kind == "cut"]
        bits = call.tape.live(tensor) or (cuts[-1].live if cuts else 0)
        value = float(tensor) if call.name in ("tolist", "numpy") else float(call.out)
        if not bits or value.is_integer():
            return
        node = number_of(tensor.grad_fn) if tensor.grad_fn is not None else cuts[-1].node if cuts else None
        if node in self._past:
            self._differentiated.add(call.site)
        self._numbers[value] = _Number(call.site, tuple(call.tape.names_of(bits)), node)

    def _number_in(self, added: float, frame: FrameType) -> _Number | None:
        """The number that is added, or one of the variables that it is computed from."""
        if added in self._numbers:
            return self._numbers[added]
        for side in _sides(call_text(frame)):
            if any(map(_is_escape, ast.walk(side))):
                return next((n for n in self._numbers.values() if n.site == site_of(frame)), None)
            values = [_value(node, frame) for node in ast.walk(side)]
            if any(isinstance(value, Tensor) for value in values):
                continue
            held = [value for value in values if isinstance(value, float) and value in self._numbers]
            if held:
                return self._numbers[held[0]]
        return None

    def _told(self, number: _Number, place: Site | None) -> Fault:
        return self.fault(
            f"a part of the loss that was computed from {listed(number.names)} is a Python number: it is a constant "
            "there",
            where=f"{at(number.site, 'an unknown line')}; added at {at(place, 'the loss')}",
            why="`.item()` and `float()` leave the graph: the part is logged with the loss and trains nothing",
            fix="add the tensor, and take `.item()` of it for the log only",
            names=number.names,
        )


def _sides(text: str) -> Iterator[ast.expr]:
    """The two sides of a sum, from its source."""
    try:
        (statement,) = ast.parse(text.strip()).body
    except (SyntaxError, ValueError):
        return
    if isinstance(statement, ast.AugAssign):
        yield statement.value
        return
    value = getattr(statement, "value", None)
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
        yield from (value.left, value.right)


def _is_escape(node: ast.AST) -> bool:
    """Whether a piece of source turns a tensor into a number by itself."""
    called = node.func if isinstance(node, ast.Call) else None
    return getattr(called, "attr", "") == "item" or getattr(called, "id", "") == "float"


def _value(node: ast.AST, frame: FrameType) -> Any:
    """What a name, an attribute of an object or an entry of a dictionary holds; None for all else."""
    if isinstance(node, ast.Name):
        return frame.f_locals.get(node.id, frame.f_globals.get(node.id))
    if isinstance(node, ast.Attribute):
        held = _value(node.value, frame)
        return getattr(held, "__dict__", {}).get(node.attr) if not isinstance(held, Tensor) else None
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        held = _value(node.value, frame)
        return held.get(node.slice.value) if type(held) is dict else None
    return None
