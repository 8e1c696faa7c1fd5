"""Learning rates that are set where no optimizer looks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from safeloop.checks.check import EventCheck
from safeloop.checks.events import Event, LoopState, Update
from safeloop.checks.source import at
from safeloop.faults import Fault

_NAMES = ("lr", "learning_rate")


class RateSetNowhere(EventCheck):
    """The learning rate is set as an attribute of the optimizer, or under a key that it does not read.

    ## What it does
    Looks, at each step of an optimizer of torch, for a number in `optimizer.lr`, `optimizer.learning_rate` or
    `group["learning_rate"]` that is not the `lr` of its groups.

    ## Why it is bad
    The step reads `group["lr"]` and nothing else. Python lets anybody set any attribute or key: the decay that was
    meant never happens, without an error.

    ## Bad
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for i in range(6):
            optimizer.lr = 0.01 * 0.5**i
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for i in range(6):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * 0.5**i
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            audit.step()
    ```
    ## Fix
    Set `group["lr"]` of every group, or use a scheduler.

    ## Source
    Documentation of `torch.optim`, "How to adjust learning rate".
    """

    code = "SL661"
    title = "learning rate set where no optimizer looks"
    severity = "warning"

    def __init__(self) -> None:
        self._told: set[str] = set()

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the first step with another rate than the one that was set."""
        if not isinstance(event, Update) or event.owner in self._told:
            return
        optimizer = state.optimizers[event.owner]
        found = next(_set_elsewhere(optimizer), None) if type(optimizer).__module__.startswith("torch.optim") else None
        if found is None:
            return
        self._told.add(event.owner)
        place, value, rate = found
        yield self.fault(
            f"{place} of `{event.owner}` is {value:.3g}, and its learning rate (lr) stays {rate:.3g}",
            where=at(event.site, f"step of `{event.owner}`"),
            why="the step reads `param_groups[i]['lr']` alone; any other attribute or key is a name that nobody reads",
            fix="set it in the groups: `for group in optimizer.param_groups: group['lr'] = ...`, or use a scheduler",
            names=(event.owner,),
        )


def _set_elsewhere(optimizer: Any) -> Iterator[tuple[str, float, float]]:
    """Where a rate was set, its value, and the rate that is used instead."""
    for group in optimizer.param_groups:
        rate = group.get("lr")
        if not isinstance(rate, (int, float)):
            continue
        places = [(f"attribute `{name}`", vars(optimizer).get(name)) for name in _NAMES]
        places.append(("key `learning_rate` in a group", group.get("learning_rate")))
        for place, value in places:
            if isinstance(value, (int, float)) and value != rate:
                yield place, float(value), float(rate)
