"""Parameters that were frozen, and that a switch for their whole module thaws with the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from safeloop.autograd.sites import Site
from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck, EventCheck
from safeloop.checks.events import Backward, Event, LoopState, Update
from safeloop.checks.source import at
from safeloop.checks.wording import agree, listed
from safeloop.faults import Fault

_CYCLES = 2
"""So often must a module be frozen and thawed as a whole."""


@dataclass(slots=True)
class _Part:
    """The parameters of a module that were frozen when the watch began, and those around them that were not."""

    path: str
    frozen: dict[str, Any] = field(default_factory=dict)
    trained: dict[str, Any] = field(default_factory=dict)
    is_down: bool = False
    """whether all of it was frozen when it was looked at last"""
    cycles: int = 0
    is_well: bool = False
    """whether the trained ones have come back alone: somebody knows which are which"""
    site: Site | None = None
    """the line that thawed one of the frozen ones"""

    def look(self) -> None:
        """Note what requires grad now."""
        on = [p.requires_grad for p in self.trained.values()]
        if not any(on):
            self.is_down = self.is_down or not any(p.requires_grad for p in self.frozen.values())
        elif self.is_down and all(on):
            self.is_down = False
            self.cycles += 1
            self.is_well = self.is_well or not all(p.requires_grad for p in self.frozen.values())


class ThawedWithTheRest(CallCheck, EventCheck):
    """Frozen parameters are thawed by a switch that turns their whole module on and off.

    ## What it does
    Notes which parameters were frozen when the watch began, inside of a module that also has others. Speaks where all
    of the module is frozen and thawed, twice, and the frozen ones come back with the others each time, have gradients
    and are stepped. Parameters that are thawed once, and modules that were frozen or trainable as a whole, are well.

    ## Why it is bad
    `set_requires_grad(D, True)` before the discriminator's phase does not restore what was: it turns everything on. A
    pretrained part that was frozen is trained from the first step, and nothing tells.

    ## Bad
    ```python
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model[0].requires_grad_(False)  # pretrained
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(6):
            model.requires_grad_(True)
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
            optimizer.step()
            model.requires_grad_(False)
            point = torch.randn(8, 4, requires_grad=True)
            model(point).sum().backward()
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model[0].requires_grad_(False)  # pretrained
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(6):
            model[1].requires_grad_(True)
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 1)).backward()
            optimizer.step()
            model[1].requires_grad_(False)
            point = torch.randn(8, 4, requires_grad=True)
            model(point).sum().backward()
            audit.step()
    ```
    ## Fix
    Switch only the parameters that were trainable, and give the optimizer no others.

    ## Source
    https://github.com/autonomousvision/projected-gan (its loop freezes the features again after each switch).
    """

    code = "SL663"
    title = "frozen parameters thawed with the rest"
    severity = "warning"
    hears = frozenset(("requires_grad_", ".requires_grad="))

    def __init__(self, model: nn.Module) -> None:
        self._parts = list(_parts(model))
        self._part_of = {id(p): part for part in self._parts for p in part.frozen.values()}
        self._told: set[str] = set()

    def hear(self, call: Call) -> Iterator[Fault]:
        """Note the line that thaws a parameter which was frozen."""
        if self._part_of and call.args:
            part = self._part_of.get(id(call.args[0]))
            if part is not None and call.args[0].requires_grad:
                part.site = call.site
        return iter(())

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At a step that moves such a parameter, once its module was switched twice."""
        if not self._parts or not isinstance(event, (Backward, Update)):
            return
        for part in self._parts:
            part.look()
        if not isinstance(event, Update) or event.has_closure:
            return
        moving = state.owners[event.owner] - event.absent - event.frozen - self._told
        found = [p for p in self._parts if p.cycles >= _CYCLES and not p.is_well and p.frozen.keys() & moving]
        if not found:
            return
        names = sorted(name for part in found for name in part.frozen.keys() & moving)
        self._told |= set(names)
        yield self.fault(
            f"{listed(names)} {agree(len(names), 'was', 'were')} frozen when the loop began; what switches "
            f"`{found[0].path or 'the model'}` on thaws {agree(len(names), 'it', 'them')} too, and `{event.owner}` "
            f"trains {agree(len(names), 'it', 'them')}",
            where=f"{at(found[0].site, 'unknown line')}; the step: {at(event.site, 'unknown')}",
            why="`requires_grad_(True)` on a whole module does not restore what was: it also turns on what was frozen "
            "before",
            fix="switch only the parameters that were trainable: keep them in a list, and give the optimizer no others",
            names=names,
        )


def _parts(model: nn.Module) -> Iterator[_Part]:
    """The frozen parameters, each with the smallest module around it that also has trainable ones of its own."""
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    if not frozen:
        return
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    around: dict[str, dict[str, Any]] = {}
    for name, p in trained.items():
        for path in _ancestors(name):
            around.setdefault(path, {})[name] = p
    parts: dict[str, _Part] = {}
    for name, p in frozen.items():
        nearest = next((path for path in _ancestors(name) if path in around), None)
        if nearest is not None:
            parts.setdefault(nearest, _Part(nearest, trained=around[nearest])).frozen[name] = p
    yield from parts.values()


def _ancestors(name: str) -> Iterator[str]:
    """The modules around a parameter, from the inside: `a.b` and `a` and the model for `a.b.weight`."""
    while name:
        name = name.rpartition(".")[0]
        yield name
