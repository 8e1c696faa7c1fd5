"""Constants that a comparison puts into the loss in the place of a term, every time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from safeloop.autograd.lineage import Mark
from safeloop.autograd.numbers import number_of
from safeloop.autograd.sites import Site
from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck, EventCheck
from safeloop.checks.events import Event, LoopState
from safeloop.checks.source import at
from safeloop.checks.terms.constants import ADDS, summands
from safeloop.checks.wording import listed
from safeloop.faults import Fault

_COMPARES = frozenset(("gt", "ge", "lt", "le", "__gt__", "__ge__", "__lt__", "__le__"))
_CHOSEN = "chosen against a term"
_LEAST = 12
"""So often it must have been chosen, and always."""
_FAR = 100.0
"""A floor that is within this factor of its term may be reached later: free bits at the start of a run."""


@dataclass(slots=True)
class _Choice:
    """A line that compares a term with a constant."""

    constant: float
    names: tuple[str, ...] = ()
    times: int = 0
    """how often the loss contained the constant"""
    outcomes: set[bool] = field(default_factory=set)
    values: list[float] = field(default_factory=list)
    """the least and the largest value of the term"""


class ConstantAlwaysChosen(CallCheck, EventCheck):
    """A comparison such as `max(floor, kl)` puts the constant into the loss, every time.

    ## What it does
    Follows, in a loop of your own, constants that a scalar with a graph is compared with, and that are then added to
    the loss: Python's `max` and `min`, or an `if`. Told at the end where the comparison came out the same all of at
    least 12 times, and the term was never within a factor of 100 of the constant: a floor for free bits may well hold
    for the first steps of a run. Cost: two readings for each such comparison, on the steps that are looked at in depth.

    ## Why it is bad
    The loss contains a number in the place of the term, which trains nothing: a floor in another unit, a cap that every
    value exceeds. The logged loss does not show it.

    ## Bad
    ```python
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(14):
            x = torch.randn(8, 4)
            out = model(x)
            size = out.square().mean()
            loss = F.mse_loss(out, x) + max(torch.tensor(256.0), size)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(14):
            x = torch.randn(8, 4)
            out = model(x)
            size = out.square().mean()
            loss = F.mse_loss(out, x) + max(torch.tensor(0.01), size)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            audit.step()
    ```
    ## Fix
    Correct the unit of the constant (for each sample, for each dimension, a sum or a mean), or take the term out.

    ## Source
    D. P. Kingma et al., "Improved Variational Inference with Inverse Autoregressive Flow", 2016: free bits.
    """

    code = "SL466"
    title = "constant always chosen in place of a term"
    severity = "warning"
    hears = ADDS | _COMPARES

    def __init__(self) -> None:
        self._choices: dict[Site, _Choice] = {}
        self._recent: dict[float, Site] = {}
        """plain numbers that terms were compared with, since the last backward pass"""
        self._sums: dict[int, Site] = {}
        """the node of a sum that contains a constant -> the line of the comparison"""

    def hear(self, call: Call) -> Iterator[Fault]:
        """Note comparisons of a term with a constant, and sums with such a constant."""
        if call.name in _COMPARES:
            self._compared(call)
        elif self._choices and isinstance(call.out, Tensor) and not call.out.dim() and call.out.grad_fn is not None:
            number = number_of(call.out.grad_fn)
            for given in call.args[:2]:
                if isinstance(given, Tensor) and not given.requires_grad:
                    chosen = [m.site for m in call.tape.marks_of(given) if m.kind == _CHOSEN and m.site is not None]
                    if chosen:
                        self._sums[number] = chosen[0]
                elif isinstance(given, (int, float)) and given in self._recent:
                    self._sums[number] = self._recent[given]
        return iter(())

    def summed(self, roots: Iterable[Tensor]) -> Iterator[Fault]:
        """Count the constants of losses that are about to be differentiated."""
        for number in summands(roots) if self._sums else ():
            if number in self._sums:
                self._choices[self._sums.pop(number)].times += 1
        self._sums.clear()
        self._recent.clear()
        return iter(())

    def _compared(self, call: Call) -> None:
        if len(call.args) < 2 or not isinstance(call.out, Tensor) or call.out.dim() or call.site is None:
            return
        one, other = call.args[:2]
        term, constant = (one, other) if isinstance(one, Tensor) and one.requires_grad else (other, one)
        if not isinstance(term, Tensor) or term.dim() or not (live := call.tape.live(term)):
            return
        if isinstance(constant, Tensor):
            if constant.requires_grad or constant.dim() or any(m.live for m in call.tape.marks_of(constant)):
                return
            call.tape.mark(constant, Mark(_CHOSEN, call.name, "", call.site, call.tape.module, 0))
        elif isinstance(constant, (int, float)) and constant:
            self._recent[constant] = call.site
        else:
            return
        choice = self._choices.setdefault(call.site, _Choice(float(constant), tuple(call.tape.names_of(live))))
        value = float(term)
        choice.outcomes.add(bool(call.out))
        choice.values = [min([*choice.values, value]), max([*choice.values, value])]

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """Only the end shows it."""
        return iter(())

    def close(self, state: LoopState) -> Iterator[Fault]:
        """Constants that were chosen every time, and that no value came near to."""
        for site, choice in self._choices.items():
            if choice.times < _LEAST or len(choice.outcomes) > 1 or not _is_far(choice):
                continue
            low, high = choice.values
            yield self.fault(
                f"the loss contains the constant {choice.constant:.4g} in the place of a term of {listed(choice.names)}"
                f", all of {choice.times} times",
                where=at(site, ""),
                why=f"the term lies between {low:.4g} and {high:.4g}, and the comparison always comes out the same: "
                "the constant has no gradient, and the term trains nothing",
                fix="correct the unit of the constant (for each sample, for each dimension, a sum or a mean), or take "
                "the term out",
                names=choice.names,
            )


def _is_far(choice: _Choice) -> bool:
    low, high = (abs(value) for value in choice.values)
    nearest, farthest = min(low, high), max(low, high)
    size = abs(choice.constant)
    return math.isfinite(farthest) and (size > _FAR * farthest or _FAR * size < nearest)
