"""Dropout, and other numbers of a module, that a forward in eval mode sets to zero for good."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn

from safeloop.checks.check import EventCheck
from safeloop.checks.events import Event, LoopState, Update
from safeloop.checks.source import Place
from safeloop.faults import Fault

_TIMES = 2


class SwitchedOffByEvaluation(EventCheck):
    """A forward in eval mode sets a number of its module to zero, and nothing sets it back.

    ## What it does
    Notes the positive floats that the modules of the user's own classes hold. Where one is exactly 0 at two steps in
    train mode, it reads the source of that class, and speaks if the only thing that stores it after `__init__` is a
    forward, for eval mode, which stores zero. Values that anything else stores as well, as a schedule, are left alone.

    ## Why it is bad
    `if not self.training: self.dropout_p = 0.0` is right for this call and stays for all that follow: after the first
    evaluation the model trains without dropout, and no mode tells.

    ## Bad
    ```python
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.p = nn.Linear(4, 1), 0.3

        def forward(self, x):
            if not self.training:
                self.p = 0.0
            return self.linear(F.dropout(x, self.p))

    model = Head()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for i in range(6):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            model.eval()
            with torch.no_grad():
                error = model(torch.randn(8, 4)).square().mean()
            model.train()
            audit.step()
    ```
    ## Good
    ```python
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.p = nn.Linear(4, 1), 0.3

        def forward(self, x):
            return self.linear(F.dropout(x, self.p, training=self.training))

    model = Head()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for i in range(6):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            model.eval()
            with torch.no_grad():
                error = model(torch.randn(8, 4)).square().mean()
            model.train()
            audit.step()
    ```
    ## Fix
    Use a local variable: `p = self.dropout_p if self.training else 0.0`.

    ## Source
    https://github.com/NVIDIA/Megatron-LM/pull/411.
    """

    code = "SL724"
    title = "switched off by an evaluation"
    severity = "warning"

    def __init__(self, model: nn.Module) -> None:
        self._held = [
            (path, module, attribute, value)
            for path, module in model.named_modules()
            if not type(module).__module__.startswith("torch.")
            for attribute, value in vars(module).items()
            if type(value) is float and value > 0
        ]
        self._times: Counter[tuple[str, str]] = Counter()

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the second step in train mode at which such a number is zero."""
        if not self._held or not isinstance(event, Update) or event.was_skipped:
            return
        for path, module, attribute, value in self._held:
            now = vars(module).get(attribute)
            if not module.training or type(now) not in (int, float) or now:
                continue
            self._times[path, attribute] += 1
            if self._times[path, attribute] != _TIMES or (place := _zeroed_at(type(module), attribute)) is None:
                continue
            name = f"{path}.{attribute}" if path else attribute
            yield self.fault(
                f"`{name}` was {value:g} when the loop began, and is 0 in training since a forward in eval mode has "
                "set it",
                where=str(place),
                why="what is right for an evaluation stays for all that follows: the model goes on training without it "
                "in train mode",
                fix=f"use a local variable: `value = self.{attribute} if self.training else 0.0`",
                names=(name,),
            )


def _zeroed_at(cls: type, attribute: str) -> Place | None:
    """The line that sets an attribute to zero in eval mode, where nothing but such lines stores it after `__init__`."""
    found: Place | None = None
    for base in cls.__mro__:
        if base in nn.Module.__mro__:
            continue
        for name, function in vars(base).items():
            if name == "__init__" or not inspect.isfunction(function):
                continue
            try:
                lines, first = inspect.getsourcelines(function)
                tree = ast.parse(textwrap.dedent("".join(lines)))
            except (OSError, SyntaxError, TypeError):
                return None
            ours = set(_zeroing(tree, attribute))
            if any(
                isinstance(node, ast.Call) and _names(node.func) & {"setattr", "__setattr__"} for node in ast.walk(tree)
            ):
                return None
            if _stores(tree, attribute) - ours:
                return None
            for line in ours:
                found = found or Place(function.__code__.co_filename, first + line - 1, function.__qualname__)
    return found


def _zeroing(tree: ast.AST, attribute: str) -> Iterator[int]:
    """The lines that store zero in eval mode."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If):
            for statement in _in_eval(node.test, node.body, node.orelse):
                for inner in ast.walk(statement):
                    if isinstance(inner, ast.Assign) and attribute in _targets(inner) and _is_zero(inner.value):
                        yield inner.lineno
        elif isinstance(node, ast.Assign) and attribute in _targets(node) and isinstance(node.value, ast.IfExp):
            value = node.value
            other = _in_eval(value.test, [value.orelse], [value.body])
            if any(map(_is_zero, _in_eval(value.test, [value.body], [value.orelse]))) and any(
                attribute in _names(one) for one in other
            ):
                yield node.lineno


def _in_eval(test: ast.expr, then: list[Any], otherwise: list[Any]) -> list[Any]:
    """What runs in eval mode only: under `not self.training`, or in the `else` of `self.training`."""
    if any(
        isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not) and "training" in _names(node.operand)
        for node in ast.walk(test)
    ):
        return then
    return otherwise if isinstance(test, ast.Attribute) and test.attr == "training" else []


def _stores(tree: ast.AST, attribute: str) -> set[int]:
    """The lines that store an attribute of anything."""
    kinds = (ast.Store, ast.Del)
    return {
        n.lineno
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and n.attr == attribute and isinstance(n.ctx, kinds)
    }


def _targets(node: ast.Assign) -> set[str]:
    return {target.attr for target in node.targets if isinstance(target, ast.Attribute)}


def _names(node: ast.AST) -> set[str]:
    found = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    return found | {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def _is_zero(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) in (int, float) and not node.value
