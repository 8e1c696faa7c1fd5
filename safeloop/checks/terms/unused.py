"""Loss terms that are computed and given to nobody."""

from __future__ import annotations

import ast
import linecache
import re
from collections.abc import Iterator
from dataclasses import dataclass

from safeloop.autograd.scalars import Scalar
from safeloop.autograd.sites import Site
from safeloop.autograd.survey import survey
from safeloop.autograd.tape import Call, Tape
from safeloop.checks.check import CallCheck, EventCheck
from safeloop.checks.events import Event, Iteration, LoopState
from safeloop.checks.source import at
from safeloop.checks.terms.hand_made import tensors_at
from safeloop.faults import Fault

_LEAST = 6
"""Iterations that must have computed it in vain."""
_OTHERS = frozenset(
    ("val", "valid", "validation", "test", "eval", "total", "log", "logged", "monitor", "metric", "old", "last", "best")
)
"""Words in the name of a loss that is only looked at."""
_INSTALLED = re.compile(r"[/\\\\](site|dist)-packages[/\\\\]")


@dataclass(slots=True)
class _Seen:
    """A line that makes a scalar."""

    times: int = 0
    is_used: bool = False


class LossNeverUsed(CallCheck, EventCheck):
    """A loss term is computed on every iteration, and nothing is ever done with it.

    ## What it does
    Follows, in a loop of your own, the scalars with a graph that are stored under the name of a loss term, as an
    attribute (`self.aux_loss`) or a variable that nobody reads (`kl_loss`, `penalty`), and tells at the end those that
    at least 6 iterations have computed, where no backward pass has ever visited one, nobody has added, read, logged
    or printed one, and nobody has kept one. A plain `loss`, those of a validation, and code of installed packages are
    left alone; penalties on gradients are SL440. Cost: none beyond the tape of calls.

    ## Why it is bad
    The line that adds the term to the loss was lost, or the model keeps it for a loop that does not know: a balance
    loss of a mixture of experts, a commitment loss, a penalty. The model trains without it, and nothing shows it.

    ## Bad
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x):
            h = self.body(x)
            self.aux_loss = 0.1 * h.square().mean()
            return self.head(h)

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(8):
            x = torch.randn(8, 4)
            loss = F.mse_loss(model(x), x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            audit.step()
    ```
    ## Good
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x):
            h = self.body(x)
            self.aux_loss = 0.1 * h.square().mean()
            return self.head(h)

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(8):
            x = torch.randn(8, 4)
            loss = F.mse_loss(model(x), x) + model.aux_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            audit.step()
    ```
    ## Fix
    Add the term to the loss. Where it is not wanted, do not compute it; where it is only looked at, `detach()` it.

    ## Source
    https://github.com/jingyaogong/minimind/issues/140.
    """

    code = "SL464"
    title = "loss term that is never used"
    severity = "warning"
    hears = frozenset(("grad", "backward"))

    def __init__(self) -> None:
        self._tape: Tape | None = None
        self._visited: set[int] = set()
        self._seen: dict[Site, _Seen] = {}
        self._waiting: list[Scalar] = []
        """scalars of the iteration before, which somebody may still hold"""

    def hear(self, call: Call) -> Iterator[Fault]:
        """Note what is differentiated."""
        self._tape = call.tape
        if call.name == "grad":
            self._visited |= survey(*tensors_at(call, 0, "outputs")).numbers
        return iter(())

    def visited(self, numbers: frozenset[int] | set[int]) -> Iterator[Fault]:
        """A backward pass visits these nodes."""
        self._visited |= numbers
        return iter(())

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the end of an iteration: which scalars it has used."""
        if isinstance(event, Iteration):
            for scalar in self._waiting:
                seen = self._seen[scalar.site]
                seen.times += 1
                seen.is_used |= scalar.is_used or scalar.is_alive
            self._waiting.clear()
            if self._tape is not None and self._visited:
                self._sort(self._tape)
            self._tape = None
            self._visited.clear()
        return iter(())

    def _sort(self, tape: Tape) -> None:
        last: dict[Site, Scalar] = {}
        for scalar in tape.scalars:
            if any(mark.kind == "differentiable" for mark in tape.marks_in(scalar.marks)):
                continue  # a penalty on a gradient has a code of its own
            if scalar.node in self._visited:
                self._seen.setdefault(scalar.site, _Seen()).is_used = True
            last[scalar.site] = scalar
        for site, scalar in last.items():
            seen = self._seen.setdefault(site, _Seen())
            seen.is_used |= scalar.is_used
            if not seen.is_used:
                self._waiting.append(scalar)

    def close(self, state: LoopState) -> Iterator[Fault]:
        """What nobody has ever used."""
        for site, seen in self._seen.items():
            name = "" if seen.is_used or seen.times < _LEAST else _name_at(site)
            if name:
                yield self.fault(
                    f"`{name}` is computed with a graph, and nothing is done with it: no loss contains it",
                    where=at(site, ""),
                    why=f"on none of {seen.times} iterations was it differentiated, added, read or kept: the model "
                    "trains without it",
                    fix=f"add `{name}` to the loss; where it is not wanted, do not compute it, and `detach()` it where "
                    "it is only looked at",
                    names=(name,),
                )


def _name_at(site: Site) -> str:
    """The name of a loss term under which a line stores what it computes; empty for all else."""
    if _INSTALLED.search(site.path):
        return ""
    try:
        tree = ast.parse("".join(linecache.getlines(site.path)))
    except (SyntaxError, ValueError):
        return ""
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and _holds(n, site)]
    for scope in (functions[-1] if functions else tree,):
        for statement in ast.walk(scope):
            if not isinstance(statement, ast.Assign | ast.AnnAssign) or not _holds(statement, site):
                continue
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            if len(targets) == 1 and _is_term(name := _stored(targets[0], scope)):
                return name
    return ""


def _holds(node: ast.stmt, site: Site) -> bool:
    return node.lineno <= site.line <= (node.end_lineno or node.lineno)


def _stored(target: ast.expr, scope: ast.AST) -> str:
    """The attribute, or the variable that nothing in its function reads."""
    if isinstance(target, ast.Attribute):
        return target.attr
    if not isinstance(target, ast.Name):
        return ""
    uses = (node for node in ast.walk(scope) if isinstance(node, ast.Name) and node.id == target.id)
    return "" if any(isinstance(use.ctx, ast.Load) for use in uses) else target.id


def _is_term(name: str) -> bool:
    words = name.lower().strip("_").split("_")
    is_named = ("loss" in words and len(words) > 1) or "penalty" in words
    return is_named and _OTHERS.isdisjoint(words)
