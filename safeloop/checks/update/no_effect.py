"""Steps that change no weight, although there are gradients and a learning rate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import ClassVar

from torch import Tensor

from safeloop.autograd.sites import Site
from safeloop.autograd.tape import Call
from safeloop.autograd.writes import storage_pointer
from safeloop.checks.check import CallCheck, EventCheck
from safeloop.checks.events import Event, Iteration, LoopState, Update
from safeloop.checks.source import at
from safeloop.checks.wording import listed
from safeloop.faults import Fault

_ENOUGH = 10
"""Steps in a row that have changed nothing."""
_COLLAPSED = 1e-8
"""A rate that has fallen by this factor is another fault."""
_SAMPLE = 8
"""Parameters that are compared: the smallest of an optimizer."""

_PROJECTIONS = ("clamp_", "clip_", "clamp_min_", "clamp_max_", "mul_", "div_", "add_", "sub_", "relu_", "abs_")


class StepChangesNothing(EventCheck, CallCheck):
    """An optimizer steps, has gradients and a learning rate, and not one weight changes.

    ## What it does
    Compares the smallest parameters of an optimizer, bit by bit, before its step and at the end of the iteration, on
    steps that are looked at in depth. Speaks after 10 steps in a row on which none of those with a gradient changed.
    Steps that a gradient scaler skips, and rates of zero, are other
    faults. Where the loop itself writes the old values back, it names that line.

    ## Why it is bad
    A number holds a limited count of digits: 3 in bfloat16, 7 in float32. An update that is smaller than the last
    digit of the weight is rounded away, always: a model in pure bfloat16 with a learning rate made for float32 does
    not train at all, nor does one whose schedule has let the rate collapse.

    ## Bad
    ```python
    model = nn.Linear(4, 1).to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(12):
            optimizer.zero_grad()
            model(torch.randn(8, 4, dtype=torch.bfloat16)).square().mean().backward()
            optimizer.step()
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(12):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            audit.step()
    ```
    ## Fix
    Keep the weights in float32 and compute under `torch.autocast`, or raise the learning rate; look for a schedule that
    has taken it down.

    ## Source
    Documentation of `torch.amp`; safeloop's own rule.
    """

    code = "SL657"
    title = "steps change no weight"
    severity = "warning"

    hears: ClassVar[frozenset[str]] = frozenset(("copy_", *_PROJECTIONS))

    def __init__(self) -> None:
        self._copied: dict[int, Site | None] = {}
        """where the values lie that the loop wrote over since the last step"""
        self._projected: set[int] = set()
        """where those lie that it changed in another way: moved back into a range, as a multiplier below zero"""
        self._before: dict[str, tuple[Update, list[tuple[str, Tensor, Tensor]]]] = {}
        self._row: Counter[str] = Counter()
        self._told: set[str] = set()
        self._largest: dict[str, float] = {}

    def hear(self, call: Call) -> Iterator[Fault]:
        """Notes who writes over what."""
        if call.args and isinstance(call.args[0], Tensor) and (pointer := storage_pointer(call.args[0])):
            if call.name == "copy_":
                self._copied[pointer] = call.site
            elif call.is_direct:
                self._projected.add(pointer)
        return iter(())

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the end of the tenth iteration in a row whose step changed nothing."""
        if isinstance(event, Update):
            self._copied.clear()
            self._projected.clear()
            self._before.pop(event.owner, None)
            top = self._largest[event.owner] = max(self._largest.get(event.owner, 0.0), *event.rates, 0.0)
            has_collapsed = bool(event.rates) and max(event.rates) < _COLLAPSED * top
            if event.owner not in self._told and _is_plain(event) and not has_collapsed:
                held = _smallest(event, state)
                self._before[event.owner] = event, [(name, p, p.detach().clone()) for name, p in held]
        elif isinstance(event, Iteration):
            for owner, (update, sample) in self._before.items():
                yield from self._compare(owner, update, sample)
            self._before.clear()

    def _compare(self, owner: str, update: Update, sample: list[tuple[str, Tensor, Tensor]]) -> Iterator[Fault]:
        sample = [one for one in sample if storage_pointer(one[1]) not in self._projected]
        is_same = bool(sample) and all(bool((p.detach() == before).all()) for _, p, before in sample)
        self._row[owner] = self._row[owner] + 1 if is_same else 0
        if self._row[owner] != _ENOUGH:
            return
        self._told.add(owner)
        names = [name for name, _, _ in sample]
        kinds = {str(p.dtype).removeprefix("torch.") for _, p, _ in sample}
        restored = [storage_pointer(p) for _, p, _ in sample if storage_pointer(p) in self._copied]
        if restored:
            yield self._restored(owner, names, self._copied[restored[0]])
            return
        rates = ", ".join(f"{rate:.3g}" for rate in dict.fromkeys(update.rates))
        yield self.fault(
            f"{_ENOUGH} steps of `{owner}` in a row have changed no entry of {listed(names)}, whose gradients are not "
            f"zero; lr {rates}, {' and '.join(sorted(kinds))}",
            where=at(update.site, f"step of `{owner}`"),
            why=f"each update is smaller than the last digit of a {' or '.join(sorted(kinds))} weight and rounds away",
            fix="keep the weights in float32 and compute under autocast"
            if kinds & {"bfloat16", "float16"}
            else "raise the learning rate (lr); look for a scheduler that has taken it down, such as one that is "
            "stepped on every batch instead of every epoch",
            names=names,
        )

    def _restored(self, owner: str, names: list[str], site: Site | None) -> Fault:
        return self.fault(
            f"after each of {_ENOUGH} steps of `{owner}` in a row the values from before it were written back into "
            f"{listed(names)}",
            where=at(site, "a copy after the step"),
            why="what the step has learned is thrown away: the copy goes the wrong way, or restores an old state",
            fix="copy from what trains into the other: `target.load_state_dict(online.state_dict())`",
            names=names,
        )


def _is_plain(event: Update) -> bool:
    return event.is_deep and not event.was_skipped and not event.has_closure and bool(event.rates) and all(event.rates)


def _smallest(event: Update, state: LoopState) -> list[tuple[str, Tensor]]:
    """The smallest parameters of an optimizer whose gradient is not zero."""
    idle = event.absent | event.zero | event.frozen
    groups = (group for group in state.optimizers[event.owner].param_groups)
    held = [(state.name_of.get(id(p), ""), p) for group in groups for p in group["params"]]
    moved = [(name, p) for name, p in held if name not in idle and p.grad is not None and bool(p.grad.any())]
    return sorted(moved, key=lambda found: found[1].numel())[:_SAMPLE]
