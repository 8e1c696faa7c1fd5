"""Results of custom functions that are thrown away, so that their backward never runs."""

from __future__ import annotations

import ast
import linecache
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd import Function

from safeloop.autograd.tape import Tape
from safeloop.autograd.walk import _OPAQUE
from safeloop.checks.check import Check
from safeloop.checks.source import Place
from safeloop.faults import Fault

_PATIENCE = 3
_APPLIES = re.compile(r"^\s*(?:\w+\.)*(\w+)\.apply\(")


@dataclass(slots=True)
class _Line:
    """A statement that is nothing but the call of a custom function."""

    kind: str
    place: Place
    last: int
    first: int
    """the lines of the function that it is in"""
    passes: int = 0
    """backward passes that came by without it"""


class FunctionResultDiscarded(Check):
    """A custom `torch.autograd.Function` is applied, and its result is used nowhere.

    ## What it does
    Looks in the files whose operations make the graph for statements that are nothing but `Name.apply(...)`, where
    `Name` is a `torch.autograd.Function`, in functions that run; and tells where three backward passes visit no node of
    that class. One that writes in place has its node in the graph, and is well. Cost: a search through the lines of
    these files, once, and where such a line is found a walk over the graph.

    ## Why it is bad
    `apply` changes nothing by itself: it returns a new tensor, and only who uses that one has the function in the
    graph. A scaler of an auxiliary loss, a reversed or a clipped gradient has no effect.

    ## Bad
    ```python
    class Reverse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad_output):
            return -grad_output

    class Run(sl.Trainer):
        def loss(self, batch):
            features = self.model(batch)
            Reverse.apply(features)
            return features.square().mean()

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 3}).fit()
    ```
    ## Good
    ```python
    class Reverse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad_output):
            return -grad_output

    class Run(sl.Trainer):
        def loss(self, batch):
            features = Reverse.apply(self.model(batch))
            return features.square().mean()

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 3}).fit()
    ```
    ## Fix
    Assign the result, and go on with it: `x = Name.apply(x)`.

    ## Source
    https://github.com/NVIDIA-NeMo/Automodel/issues/1408.
    """

    code = "SL331"
    title = "result of a custom function thrown away"
    severity = "warning"

    def __init__(self) -> None:
        self._paths: set[str] = set()
        self._lines: list[_Line] = []

    def visited(self, roots: Iterable[Tensor], tape: Tape) -> Iterator[Fault]:
        """The faults of losses that are about to be differentiated."""
        sites = {origin.site for origin in tape.origins.values() if origin.site is not None}
        for path in {site.path for site in sites} - self._paths:
            self._paths.add(path)
            self._lines += _lines_in(path)
        if not self._lines:
            return
        kinds = _kinds_below(roots)
        for line in list(self._lines) if kinds is not None else ():
            if line.kind in (kinds or ()):
                self._lines.remove(line)
                continue
            runs = any(site.path == line.place.path and line.first <= site.line <= line.last for site in sites)
            line.passes += runs
            if line.passes == _PATIENCE and runs:
                yield self._thrown_away(line)

    def _thrown_away(self, line: _Line) -> Fault:
        return self.fault(
            f"the result of {line.kind}.apply is thrown away, and no loss contains a node of {line.kind}",
            where=str(line.place),
            why=f"`apply` changes nothing by itself: {line.kind}.backward never runs, and what it was to do to the "
            "gradients is not done",
            fix=f"assign the result and go on with it: `x = {line.kind}.apply(x, ...)`",
            names=(line.kind,),
        )


def _lines_in(path: str) -> list[_Line]:
    """The statements of a file that apply a custom function and leave its result."""
    text = linecache.getlines(path)
    if not any(map(_APPLIES.match, text)):
        return []
    names = set(_names_below(Function))
    try:
        tree = ast.parse("".join(text))
    except (SyntaxError, ValueError):
        return []
    found: dict[int, _Line] = {}
    for function in ast.walk(tree):  # outer functions come first
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for statement in ast.walk(function):
            match = _APPLIES.match(text[statement.lineno - 1]) if isinstance(statement, ast.Expr) else None
            if match is not None and match[1] in names and _is_apply(statement):
                line = statement.lineno  # type: ignore[attr-defined]
                last = function.end_lineno or function.lineno
                found[line] = _Line(match[1], Place(path, line, function.name), last, function.lineno)
    return list(found.values())


def _is_apply(statement: Any) -> bool:
    value = statement.value
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "apply"


def _names_below(kind: type) -> Iterator[str]:
    subclasses: list[type] = type.__subclasses__(kind)
    for below in subclasses:
        yield below.__name__
        yield from _names_below(below)


def _kinds_below(roots: Iterable[Tensor]) -> set[str] | None:
    """The names of the custom functions in the graphs of some tensors; None where a part of them is hidden."""
    found: set[str] = set()
    waiting: list[Any] = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node.name() == _OPAQUE:
            return None
        if (kind := getattr(node, "_forward_cls", None)) is not None:
            found.add(kind.__name__)
        fresh = [way for way, _ in node.next_functions if way is not None and way not in seen]
        seen.update(fresh)
        waiting += fresh
    return found
