"""Optimizers that are built again for every step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from safeloop.autograd.sites import Site
from safeloop.checks.check import Check
from safeloop.checks.source import at
from safeloop.checks.wording import listed
from safeloop.faults import Fault

_ENOUGH = 5


class OptimizerBuiltAgain(Check):
    """A new optimizer is built for every step, so that what it remembers is lost each time.

    ## What it does
    Listens, in the first 20 iterations, to steps of optimizers that the watch was not given. Speaks at the fifth one in
    a row, of one class, over the same parameters, that has never stepped before. Plain SGD remembers nothing, and is
    left out.

    ## Why it is bad
    Momentum and Adam's moments live in the optimizer. A new Adam takes every step as its first: with a bias correction
    for one gradient it moves each weight by the whole learning rate in the direction of the sign, whatever the size of
    the gradient. What the audit and the schedulers were given is not what steps.

    ## Bad
    ```python
    model = nn.Linear(4, 1)
    with sl.audit(model=model, on_fault="collect") as audit:
        for _ in range(6):
            optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            audit.step()
    ```
    ## Fix
    Build the optimizer once, before the loop, and hand it to the function that steps it.

    ## Source
    Documentation of `torch.optim`, "Constructing it".
    """

    code = "SL660"
    title = "optimizer built again for every step"
    severity = "warning"

    def __init__(self) -> None:
        self._row = 0
        self._last: tuple[type, frozenset[str]] | None = None

    def stepped(self, optimizer: Any, names: Sequence[str], site: Site | None) -> Iterator[Fault]:
        """An unknown optimizer is about to step these."""
        kind = (type(optimizer), frozenset(names))
        is_new = not optimizer.state and any(_remembers(group) for group in optimizer.param_groups)
        self._row = self._row + 1 if is_new and self._last in (None, kind) else int(is_new)
        self._last = kind
        if self._row == _ENOUGH:
            name = type(optimizer).__name__
            yield self.fault(
                f"a new optimizer was built for each of {_ENOUGH} steps: {name} over {listed(names)}",
                where=at(site, "its step"),
                why=f"what {name} remembers of earlier gradients (momentum, moments) is lost each time; a scheduler or "
                "an audit holds one that is gone",
                fix="build it once, before the loop, and hand it to the function that steps it",
                names=names,
            )


def _remembers(group: dict[str, Any]) -> bool:
    """Whether a step leaves something behind for the next one."""
    return "momentum" not in group or bool(group["momentum"]) or "betas" in group or "alpha" in group
