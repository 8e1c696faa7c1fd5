"""Paths that are cut where another path of the same tensor goes on, so that every parameter still has a gradient."""

from __future__ import annotations

from collections.abc import Iterator

from safeloop.autograd.sites import Site
from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck
from safeloop.checks.source import at
from safeloop.faults import Fault


class PathCutByData(CallCheck):
    """`.data` drops one of several paths through a tensor: gradients exist everywhere, and are wrong.

    ## What it does
    Tells where `x.data` is added to, or concatenated with, something that is differentiated, and the same `x` goes on
    to the loss by another path. Differences such as `(q - x).data`, the straight-through estimator, and `.detach()`,
    which says what is meant, are not told. Cost: none beyond the tape of calls.

    ## Why it is bad
    `.data` returns the value without its history. The gradient of a skip connection is dropped, while every parameter
    still has a gradient: deep networks train badly, and nothing shows why.

    ## Bad
    ```python
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return x.data + self.inner(x)

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    sgd = {"type": "SGD", "lr": 0.1}
    model = nn.Sequential(nn.Linear(4, 4), Block())
    Run(model=model, data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return x + self.inner(x)

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    sgd = {"type": "SGD", "lr": 0.1}
    model = nn.Sequential(nn.Linear(4, 4), Block())
    Run(model=model, data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Drop `.data`. Where the path is to be cut on purpose, write `.detach()`.

    ## Source
    https://github.com/pytorch/pytorch/issues/6990.
    """

    code = "SL314"
    title = "path cut by .data"
    severity = "warning"
    hears = frozenset(["add", "__add__", "__radd__", "add_", "__iadd__", "cat", "concat", "concatenate", "stack"])

    def __init__(self) -> None:
        self._found: dict[int, tuple[Site | None, str]] = {}
        self._told: set[str] = set()

    def hear(self, call: Call) -> Iterator[Fault]:
        """Remember sums of a `.data` and something that is differentiated."""
        if not any(call.tape.live(t) for t in call.tensors):
            return iter(())
        for tensor in call.tensors:
            if call.tape.maker(tensor) != ".data":
                continue
            mark = next((m for m in reversed(list(call.tape.marks_of(tensor))) if m.name == ".data"), None)
            if mark is not None and mark.node is not None and not mark.is_difference:
                self._found[mark.node] = (mark.site, mark.module)
        return iter(())

    def visited(self, numbers: frozenset[int] | set[int]) -> Iterator[Fault]:
        """The faults of a loss whose graph visits these nodes: the same tensor goes on by another path."""
        for node, (site, module) in self._found.items():
            place = at(site, f"module `{module}`")
            if node in numbers and place not in self._told:
                self._told.add(place)
                yield self.fault(
                    "`.data` of a tensor is added to what is computed from it, and the tensor is "
                    "differentiated by another "
                    "path: one of its paths is cut",
                    where=place + (f"; module `{module}`" if module else ""),
                    why="`.data` returns the value without its history: the gradient of a residual or "
                    "skip connection is "
                    "dropped, while every parameter still has a gradient",
                    fix="drop `.data`; where the path is to be cut on purpose, write `.detach()`, which says so",
                    names=(module,) if module else (),
                )
        self._found.clear()
