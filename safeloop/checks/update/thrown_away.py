"""Updates by hand whose result goes nowhere."""

from __future__ import annotations

import ast
import linecache
import weakref
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from safeloop.autograd.lineage import Mark
from safeloop.autograd.sites import Site
from safeloop.autograd.tape import Call, Tape
from safeloop.checks.check import CallCheck, EventCheck
from safeloop.checks.events import Event, Iteration, LoopState
from safeloop.checks.source import at
from safeloop.checks.wording import listed
from safeloop.faults import Fault

_PATIENCE = 3
"""Iterations that throw the same update away."""
_GRADIENT = "gradient"
_RESULTS = ("sub", "subtract", "add", "__sub__", "__add__", "__rsub__", "__radd__", "rsub")
_METHODS = frozenset(("sub", "subtract", "add"))


class UpdateThrownAway(EventCheck, CallCheck):
    """A line computes the new value of a parameter from its gradient, and gives it to nobody.

    ## What it does
    Hears sums and differences of a parameter and what comes from a gradient, with grad mode off. Speaks at the third
    iteration at whose end the result is gone and went into no computation, where the statement rebinds the very name
    that it reads (`p = p - lr * p.grad`) or keeps nothing (`p.sub(lr * p.grad)`), and the parameter has not changed.
    Cost: none beyond the tape of calls.

    ## Why it is bad
    `p = ...` binds a name of Python's to a new tensor; the parameter of the model keeps its value. The loop runs, has
    gradients, and trains nothing.

    ## Bad
    ```python
    model = nn.Linear(4, 1)
    with sl.audit(model=model, on_fault="collect") as audit:
        for _ in range(5):
            model.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            with torch.no_grad():
                for p in model.parameters():
                    p = p - 0.1 * p.grad
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Linear(4, 1)
    with sl.audit(model=model, on_fault="collect") as audit:
        for _ in range(5):
            model.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
            audit.step()
    ```
    ## Fix
    Write into the parameter: `p -= lr * p.grad` or `p.sub_(...)` under `torch.no_grad()`.

    ## Source
    safeloop's own rule.
    """

    code = "SL671"
    title = "update thrown away"

    hears: ClassVar[frozenset[str]] = frozenset((".grad", "grad", *_RESULTS))

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names: dict[int, tuple[str, nn.Parameter]] = {}
        """where the parameters lie, of this iteration"""
        self._made: list[tuple[weakref.ref[Tensor], str, Mark, Tape]] = []
        """new values, of this iteration"""
        self._times: Counter[str] = Counter()
        self._before: dict[str, tuple[nn.Parameter, tuple[Any, ...]]] = {}

    def hear(self, call: Call) -> Iterator[Fault]:
        """Note gradients, and sums of a parameter and one of them."""
        if not call.is_direct:
            return iter(())
        if call.name in (".grad", "grad"):
            _mark_gradients(call)
        elif not call.grad_mode and isinstance(call.out, Tensor) and len(call.tensors) == 2:
            self._note(call, call.out)
        return iter(())

    def _note(self, call: Call, out: Tensor) -> None:
        """Note the new value of a parameter, where the statement that makes it can keep it nowhere."""
        site = call.site
        others = [t for t in call.tensors if not any(m.kind == _GRADIENT for m in call.tape.marks_of(t))]
        if len(others) != 1 or site is None or not _keeps_nothing(site):
            return
        name = self._name_of(call, others[0])
        if name and out.shape == others[0].shape:
            mark = Mark("new value", name, "", site, call.tape.module, 0)
            call.tape.mark(out, mark)
            self._made.append((weakref.ref(out), name, mark, call.tape))

    def _name_of(self, call: Call, tensor: Tensor) -> str:
        """The parameter whose value a tensor is, or was computed from."""
        if not self._names:
            self._names = {p.data_ptr(): (name, p) for name, p in self._model.named_parameters() if _is_plain(p)}
        name, parameter = self._names.get(_pointer(tensor), ("", None))
        if parameter is not None and parameter.shape == tensor.shape:
            return name
        found = {n for m in call.tape.marks_of(tensor) if m.kind == "cut" for n in call.tape.names_of(m.live)}
        return found.pop() if len(found) == 1 else ""

    def _thrown(self) -> dict[str, Site]:
        """The parameters whose new value is gone, and nothing was computed from it, with the line that made it."""
        made, self._made = self._made, []
        gone = [(name, mark, tape) for result, name, mark, tape in made if result() is None]
        return {name: mark.site for name, mark, tape in gone if mark.site is not None and not tape.was_read(mark)}

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the end of the third iteration of this kind."""
        if not isinstance(event, Iteration):
            return
        thrown = self._thrown() if self._made else {}
        self._names = {}
        if not thrown:
            return
        now = dict(self._model.named_parameters())
        still = {}
        for name in thrown.keys() & now.keys():
            parameter, before = self._before.setdefault(name, (now[name], _value_of(now[name])))
            self._times[name] += 1
            if parameter is now[name] and self._times[name] == _PATIENCE and _value_of(parameter) == before:
                still[name] = thrown[name]
        if still:
            yield self._fault_of([name for name in now if name in still], still)

    def _fault_of(self, names: list[str], sites: dict[str, Site]) -> Fault:
        return self.fault(
            f"in {_PATIENCE} iterations a new value of {listed(names)} was computed from the gradient and thrown away: "
            "the parameters have not changed",
            where=at(sites[names[0]], "an update by hand"),
            why="the result is a new tensor: `p = p - ...` only binds the name `p` to it, and `p.sub(...)` returns it; "
            "the model keeps the old values",
            fix="write into the parameter under torch.no_grad(): `p -= lr * p.grad`, `p.sub_(...)` or `p.copy_(...)`",
            names=names,
        )


def _mark_gradients(call: Call) -> None:
    for tensor in call.out if isinstance(call.out, (tuple, list)) else (call.out,):
        if isinstance(tensor, Tensor) and not any(mark.kind == _GRADIENT for mark in call.tape.marks_of(tensor)):
            call.tape.mark(tensor, Mark(_GRADIENT, call.name, "", call.site, call.tape.module, 0))


def _value_of(parameter: nn.Parameter) -> tuple[Any, ...]:
    """What differs once a parameter has changed; reads the device."""
    with torch.no_grad():
        values = parameter.detach().double()
        return parameter.data_ptr(), parameter._version, float(values.sum()), float(values.norm())


def _is_plain(parameter: nn.Parameter) -> bool:
    return parameter.layout is torch.strided and type(parameter) is nn.Parameter and parameter.is_floating_point()


def _pointer(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0


@lru_cache(maxsize=256)
def _keeps_nothing(site: Site) -> bool:
    """Whether the statement of a line is a sum that no other name than one of its own, or none at all, holds."""
    try:
        tree = ast.parse("".join(linecache.getlines(site.path)))
    except (SyntaxError, ValueError):
        return False
    around = [
        node
        for node in ast.walk(tree)
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.Expr)) and _covers(node, site.line)
    ]
    return bool(around) and _is_lost(min(around, key=lambda node: (node.end_lineno or node.lineno) - node.lineno))


def _covers(node: ast.stmt, line: int) -> bool:
    return node.lineno <= line <= (node.end_lineno or node.lineno)


def _is_lost(statement: ast.stmt) -> bool:
    value = getattr(statement, "value", None)
    is_sum = isinstance(value, ast.BinOp) and isinstance(value.op, (ast.Add, ast.Sub))
    is_call = isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr in _METHODS
    if not (is_sum or is_call) or value is None:
        return False
    if isinstance(statement, ast.Expr):
        return True
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    read = {node.id for node in ast.walk(value) if isinstance(node, ast.Name)}
    return len(targets) == 1 and isinstance(targets[0], ast.Name) and targets[0].id in read
