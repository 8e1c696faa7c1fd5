"""Parts of a loss whose gradients go to parameters that are never stepped for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from safeloop.autograd.lineage import Mark
from safeloop.autograd.numbers import number_of
from safeloop.autograd.sites import Site
from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck, EventCheck
from safeloop.checks.events import Backward, Event, GradientUse, LoopState, Update, Zero
from safeloop.checks.source import at
from safeloop.checks.terms.constants import ADDS, parts_of
from safeloop.checks.wording import listed
from safeloop.faults import Fault

_LEAST, _ENOUGH = 3, 12
"""So often its gradients must have been thrown away; and so often that it is told before the end."""
_KEPT = 256


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a loss that has lost its path to some of the parameters that it was computed from."""

    site: Site
    cut: Mark
    lost: frozenset[str]
    reached: frozenset[str]


@dataclass(slots=True)
class _Fate:
    """What became of the gradients of the parts that a line makes."""

    part: _Part
    thrown_away: int = 0
    is_used: bool = False
    waiting: set[str] = field(default_factory=set)
    """parameters that hold gradients of the last one, which nobody has used yet"""


class PartTrainsNobody(CallCheck, EventCheck):
    """A part of a loss has lost its path to what the loss trains, and trains nothing else.

    ## What it does
    Looks, in a loop of your own, at each part of a sum that is differentiated: one that was computed from parameters
    by a path that is cut, and whose gradients reach others only, where `zero_grad` throws them away every time, before
    an optimizer steps on them. Told after 12 times, or at the end after 3. A part whose gradients are ever stepped on
    or read is well. Cost: none beyond the tape of calls.

    ## Why it is bad
    The adversarial loss of a generator that is computed on `fake.detach()` leaves its gradients in the discriminator,
    where the discriminator's own `zero_grad` drops them: the generator never hears of it. No gradient is missing, since
    the other parts of the loss reach the generator, and the part is logged as if it were trained.

    ## Bad
    ```python
    gen, disc = nn.Linear(2, 4), nn.Linear(4, 1)
    opt_g, opt_d = torch.optim.SGD(gen.parameters(), lr=0.01), torch.optim.SGD(disc.parameters(), lr=0.01)
    models, optimizers = {"gen": gen, "disc": disc}, {"opt_g": opt_g, "opt_d": opt_d}
    with sl.audit(model=models, optimizers=optimizers, on_fault="collect") as audit:
        for _ in range(8):
            z, real = torch.randn(8, 2), torch.randn(8, 4)
            fake = gen(z)
            opt_g.zero_grad()
            fooled = F.softplus(-disc(fake.detach())).mean()
            (fooled + F.l1_loss(fake, real)).backward()
            opt_g.step()
            opt_d.zero_grad()
            (F.softplus(-disc(real)) + F.softplus(disc(fake.detach()))).mean().backward()
            opt_d.step()
            audit.step()
    ```
    ## Good
    ```python
    gen, disc = nn.Linear(2, 4), nn.Linear(4, 1)
    opt_g, opt_d = torch.optim.SGD(gen.parameters(), lr=0.01), torch.optim.SGD(disc.parameters(), lr=0.01)
    models, optimizers = {"gen": gen, "disc": disc}, {"opt_g": opt_g, "opt_d": opt_d}
    with sl.audit(model=models, optimizers=optimizers, on_fault="collect") as audit:
        for _ in range(8):
            z, real = torch.randn(8, 2), torch.randn(8, 4)
            fake = gen(z)
            opt_g.zero_grad()
            fooled = F.softplus(-disc(fake)).mean()
            (fooled + F.l1_loss(fake, real)).backward()
            opt_g.step()
            opt_d.zero_grad()
            (F.softplus(-disc(real)) + F.softplus(disc(fake.detach()))).mean().backward()
            opt_d.step()
            audit.step()
    ```
    ## Fix
    Compute the part from the tensor itself, without `detach()`; that belongs to the step of the opponent.

    ## Source
    https://github.com/nikhilsinghmus/image2reverb/issues/37.
    """

    code = "SL465"
    title = "part of the loss trains nobody"
    severity = "warning"
    hears = ADDS

    def __init__(self) -> None:
        self._parts: dict[int, _Part] = {}
        """the node of a scalar that was added -> what it is"""
        self._found: list[_Part] = []
        """the parts of the pass that is about to run"""
        self._fates: dict[Site, _Fate] = {}
        self._cuts: set[Site | None] = set()
        """the lines of cuts that were told of: sums that contain such a part have lost the path as well"""

    def hear(self, call: Call) -> Iterator[Fault]:
        """Remember scalars that are added, and that have lost a path."""
        if len(self._parts) > _KEPT:
            self._parts.clear()
        tape = call.tape
        for tensor in call.tensors:
            site = None if tensor.dim() or tensor.grad_fn is None else tape.site_of(tensor)
            if site is None or tensor.grad_fn is None:
                continue
            live = tape.live(tensor)
            cuts = [mark for mark in tape.marks_of(tensor) if mark.kind == "cut" and mark.live & ~live]
            if cuts and live:
                cut = max(cuts, key=lambda mark: (mark.live & ~live).bit_count())
                lost = frozenset(tape.names_of(cut.live & ~live))
                part = _Part(site, cut, lost, frozenset(tape.names_of(live)))
                self._parts[number_of(tensor.grad_fn)] = part
        return iter(())

    def summed(self, roots: Iterable[Tensor]) -> Iterator[Fault]:
        """Find the parts of losses that are about to be differentiated."""
        nodes = {number for root in roots for number in parts_of(root)} if self._parts else set()
        self._found = [part for number, part in self._parts.items() if number in nodes]
        self._parts.clear()
        return iter(())

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """Follow where the gradients of these parts go."""
        if isinstance(event, Backward):
            self._passes(event, state)
        elif isinstance(event, Update):
            self._used(state.owners[event.owner])
        elif isinstance(event, GradientUse):
            self._used(event.parameters)
        elif isinstance(event, Zero):
            for fate in self._fates.values():
                if fate.waiting and not state.inside:
                    fate.waiting -= event.parameters
                    fate.thrown_away += not fate.waiting
                    yield from self._told(fate, _ENOUGH)

    def close(self, state: LoopState) -> Iterator[Fault]:
        """What the end shows."""
        for fate in self._fates.values():
            yield from self._told(fate, _LEAST)

    def _passes(self, event: Backward, state: LoopState) -> None:
        for part in self._found:
            fate = self._fates.setdefault(part.site, _Fate(part))
            is_lost = bool(part.lost & event.reached) and not part.reached & part.lost
            if not is_lost or not state.is_known or event.reaches_inputs:
                fate.is_used = True
            fate.waiting |= part.reached & state.owner_of.keys()
        self._found = []

    def _used(self, names: frozenset[str]) -> None:
        for fate in self._fates.values():
            fate.is_used |= not names.isdisjoint(fate.waiting)

    def _told(self, fate: _Fate, times: int) -> Iterator[Fault]:
        part = fate.part
        if fate.is_used or fate.thrown_away < times or part.cut.site in self._cuts:
            return
        self._cuts.add(part.cut.site)
        lost, reached = listed(sorted(part.lost)), listed(sorted(part.reached))
        yield self.fault(
            f"a part of the loss trains nothing: its path to {lost} is cut by {part.cut.reason}, and what it leaves in "
            f"{reached} is thrown away",
            where=f"{at(part.site, '')}; cut at {at(part.cut.site, 'an unknown line')}",
            why=f"the gradients of these were zeroed {fate.thrown_away} times before any optimizer had stepped on them",
            fix="compute the part without the cut, which belongs to the step of the other network",
            names=sorted(part.lost),
        )
