"""Entries whose gradient the program sets to zero, and that the optimizer moves all the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from safeloop.checks.check import Check
from safeloop.checks.update.steps import moves_without_gradient
from safeloop.checks.wording import listed
from safeloop.faults import Fault

_ENOUGH = 5
"""Steps looked at, one after the other, between which masked entries have moved."""
_SAMPLE = 1 << 16
"""Entries of a parameter that are compared."""


class _Trace:
    """What is known of one parameter, of the entries that are compared."""

    def __init__(self) -> None:
        self.active: Tensor | None = None
        """whether an entry had a gradient, of this step, before the program wrote into it"""
        self.masked: Tensor | None = None
        """whether the program has ever set the gradient of an entry to zero"""
        self.trained: Tensor | None = None
        """whether it has ever left one there"""
        self.before: tuple[Tensor, Tensor] | None = None
        """the values at the step that was looked at last, and whether the gradient was zero"""
        self.moves = 0
        self.is_over = False


class MaskedButMoving(Check):
    """The program masks the gradient of some entries, which are to stay, and weight decay or momentum moves them.

    ## What it does
    Notes, of parameters with a hook or whose `.grad` the loop writes, which entries had a gradient in the backward
    pass and have none at the step: up to 65536 entries, on the iterations that are looked at in depth. Speaks when such
    entries have changed between 5 steps in a row, if they are the same ones each time and the optimizer has weight
    decay or momentum. Entries that are zero, or that the loop restores after the step, do not move.

    ## Why it is bad
    A gradient of zero is no freeze: AdamW multiplies every weight of a parameter by `1 - lr * weight_decay`, and
    momentum goes on. Old tokens of a table, or the weights of an earlier task, fade while one new row trains.

    ## Bad
    ```python
    table = nn.Embedding(10, 4)
    optimizer = torch.optim.AdamW(table.parameters(), lr=0.01, weight_decay=0.1)
    with sl.audit(model=table, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(10):
            optimizer.zero_grad()
            table(torch.arange(10)).square().mean().backward()
            table.weight.grad[:9] = 0
            optimizer.step()
            audit.step()
    ```
    ## Good
    ```python
    table = nn.Embedding(10, 4)
    optimizer = torch.optim.AdamW(table.parameters(), lr=0.01, weight_decay=0.0)
    with sl.audit(model=table, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(10):
            optimizer.zero_grad()
            table(torch.arange(10)).square().mean().backward()
            table.weight.grad[:9] = 0
            optimizer.step()
            audit.step()
    ```
    ## Fix
    Set `weight_decay=0` (and no momentum from before) for this parameter, put what trains into a parameter of its own,
    or copy the old values back after each step.

    ## Source
    https://github.com/huggingface/diffusers, `examples/textual_inversion`, which copies the old rows back.
    """

    code = "SL675"
    title = "masked but moving"
    severity = "warning"

    def __init__(self, optimizers: Mapping[str, Optimizer]) -> None:
        self._optimizers = optimizers
        self._traces: dict[str, _Trace] = {}

    def reached(self, name: str, gradient: Tensor) -> None:
        """A backward pass brings a gradient, which nobody has written into yet."""
        trace = self._traces.setdefault(name, _Trace())
        if not trace.is_over and gradient.layout is torch.strided:
            active = _sampled(gradient) != 0
            trace.active = active if trace.active is None else trace.active | active

    def stepping(self, parameters: Mapping[str, Tensor], places: Mapping[str, str]) -> Iterator[Fault]:
        """A step is about to run: what is left of the gradients."""
        for name, trace in self._traces.items():
            p = parameters.get(name)
            active, trace.active = trace.active, None
            if p is None or p.grad is None or active is None or trace.is_over:
                continue
            trained = _sampled(p.grad) != 0
            moved = _moved(trace, _sampled(p), active, trained)
            if moved and trace.moves == _ENOUGH:
                trace.is_over = True
                yield from self._faults(name, p, places[name])

    def _faults(self, name: str, parameter: Any, where: str) -> Iterator[Fault]:
        for owner, optimizer in self._optimizers.items():
            for group in optimizer.param_groups:
                is_moved = name in moves_without_gradient(optimizer, {name}, {id(parameter): name})
                if is_moved and any(p is parameter for p in group["params"]):
                    decay = group.get("weight_decay") or 0
                    cause = f"weight_decay={decay:g}" if decay else "momentum"
                    yield self._fault_of(name, owner, cause, where)

    def _fault_of(self, name: str, owner: str, cause: str, where: str) -> Fault:
        return self.fault(
            f"entries of {listed([name])} whose gradient the program sets to zero are moved by `{owner}` ({cause}) at "
            "each step",
            where=where,
            why="a gradient of zero is no freeze: weight decay and momentum act on every entry of a parameter that has "
            "a gradient",
            fix="set weight_decay=0 for this parameter, put what trains into a parameter of its own, or copy the old "
            "values back after each step",
            names=(name,),
        )


def _moved(trace: _Trace, values: Tensor, active: Tensor, trained: Tensor) -> bool:
    """Whether entries that are always masked have changed since the step before; reads the device."""
    masked = active & ~trained
    trace.masked = masked if trace.masked is None else trace.masked | masked
    trace.trained = trained if trace.trained is None else trace.trained | trained
    if bool((trace.masked & trace.trained).any()):
        trace.is_over = True  # a mask that changes, as one drawn at random
        return False
    moved = False
    if trace.before is not None:
        old, was_zero = trace.before
        moved = bool((trace.masked & was_zero & (old != 0) & (old != values)).any())
        trace.moves = trace.moves + 1 if moved else 0
    trace.before = values.clone(), ~trained
    return moved


def _sampled(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE)]
