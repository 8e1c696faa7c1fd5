"""Gradients that hold NaN or infinity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck, EventCheck
from safeloop.checks.events import Event, LoopState, Update
from safeloop.checks.gradients.suspects import HEARD, Suspects
from safeloop.checks.source import at
from safeloop.checks.views import GradientsView
from safeloop.checks.wording import counted, listed
from safeloop.faults import Fault

_SHOWN = 4
_DEEP = 'the operation is named on steps that are looked at in depth: `sl.audit(..., level="full")` looks at all'


class NonFiniteGradient(CallCheck, EventCheck):
    """A gradient holds NaN or infinity.

    ## What it does
    Checks the gradients of every update before it, through the gradient norm; only where that is not finite are they
    searched, one by one. Cost on a healthy step: none beyond the norm. In a loop that is not ours, steps that are not
    looked at in depth are sampled: one small gradient of each optimizer, on the CPU alone (5 us); what that misses
    shows at the end, in the weights. The line is not known then: told are the operations that had come nearest to the
    edge of their domain on the steps that were looked at.

    A Trainer then runs the step again, bitwise, and names the loss term, the micro-batch, the operation that gave the
    first NaN or infinity, your line of it and the trap behind it; `safeloop replay` does so from the bundle in the run
    folder (`nonfinite.save_bundle`).

    ## Why it is bad
    One update with a NaN ruins the parameter for good, and clipping would spread it to all others. A loss can be
    finite while its gradient is not: the derivative of `sqrt` at 0 is infinite, and `torch.where` multiplies the
    branch not taken by zero, which makes infinity a NaN.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            points = self.model(batch)
            gaps = points[:, None] - points[None]
            return gaps.square().sum(-1).sqrt().mean()

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 2), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            points = self.model(batch)
            gaps = points[:, None] - points[None]
            return torch.linalg.vector_norm(gaps, dim=-1).mean()

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 2), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Where the terms are finite, look for `sqrt`, `log`, `acos`, division or a power at the edge of their domain, also
    behind `torch.where` and masks: move the argument inside first (`x.clamp(min=eps).sqrt()`, `torch.where(m, x, 1)`
    before the root). Where a gradient is infinite, look for an overflow: a recurrent gain above 1, a missing
    normalisation. `nonfinite: {policy: skip, max_consecutive: 3}` leaves such updates out, and ends the run when they
    come in a row.

    ## Source
    https://github.com/pytorch/pytorch/issues/6394; https://github.com/pytorch/pytorch/issues/187297.
    """

    code = "SL501"
    title = "non-finite gradient"

    hears = HEARD

    def __init__(self) -> None:
        self._is_told = False
        self._suspects = Suspects()

    def hear(self, call: Call) -> Iterator[Fault]:
        """Remember what may give a NaN later, when nobody looks."""
        self._suspects.hear(call)
        return iter(())

    def _where(self, where: str) -> str:
        suspects = self._suspects.text()
        return f"{where}; what came nearest to the edge of its domain earlier: {suspects}" if suspects else where

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """Before a step that nobody looks at in depth: whether one small gradient holds NaN or infinity."""
        if self._is_told or not isinstance(event, Update) or not event.is_bad or event.is_scaled_step:
            return
        self._is_told = True
        if event.is_deep:  # those who look at this step in depth tell it
            return
        parameters = dict(_named(event.owner, state))
        where = f"step {event.iteration}; {at(event.site, f'before step() of `{event.owner}`')}"
        for fault in self.find(GradientsView(parameters, {}, event.iteration, where)):
            yield replace(fault, where=self._where(fault.where), fix=f"{fault.fix}; {_DEEP}")

    def close(self, state: LoopState) -> Iterator[Fault]:
        """Weights that hold NaN at the end, where no gradient was seen to."""
        if self._is_told:
            return
        held = {name: p for owner in state.owners for name, p in _named(owner, state) if not p.is_sparse}
        bad = [name for name, p in held.items() if p.is_floating_point() and bool(p.detach().isnan().any())]
        if bad:
            yield self.fault(
                f"{len(bad)} of {counted(len(held), 'parameter')} hold NaN at the end of the loop: {listed(bad)}",
                where=self._where("a step that was not looked at in depth"),
                why="a gradient that was not finite has reached them; no later step can mend that",
                fix=f"stop before such a step: `if not torch.isfinite(loss): ...`; {_DEEP}",
                names=bad,
            )

    @classmethod
    def find(cls, view: GradientsView) -> Iterator[Fault]:
        """One fault for all of them; nothing where only a norm overflowed."""
        gradients = {name: p.grad for name, p in view.parameters.items() if p.grad is not None}
        counts = {name: _nonfinite(gradient) for name, gradient in gradients.items()}
        bad = {name: count for name, count in counts.items() if count[0]}
        if not bad:
            return
        shown = [f"`{name}`, {found} of {total} entries" for name, (found, total) in bad.items()]
        more = f"; {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        values = {name: float(value.detach()) for name, value in view.terms.items()}
        are_finite = all(torch.isfinite(torch.tensor(value)) for value in values.values())
        yield cls.fault(
            f"{len(bad)} of {counted(len(gradients), 'gradient')} hold NaN or infinity: "
            f"{'; '.join(shown[:_SHOWN])}{more}",
            where=view.where
            + "; loss terms: " * bool(values)
            + ", ".join(f"`{name}` = {value:.4g}" for name, value in values.items()),
            why="the loss is not finite itself, or the derivative of an operation on the way to it is not"
            if not values
            else "every loss term is finite, so that the value was born in the backward pass"
            if are_finite
            else "a loss term is not finite itself: its gradients cannot be",
            fix="look for sqrt, log, acos, division or a power at the edge of its domain, also behind torch.where "
            "and masks, or for an overflow; "
            + (
                "`nonfinite.policy: skip` leaves such updates out"
                if values
                else "leave out an update whose gradient norm is not finite"
            ),
            names=tuple(bad),
        )


def _nonfinite(gradient: Tensor) -> tuple[int, int]:
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return int(values.isfinite().logical_not().sum()), values.numel()


def _named(owner: str, state: LoopState) -> Iterator[tuple[str, nn.Parameter]]:
    for group in state.optimizers[owner].param_groups:
        for parameter in group["params"]:
            if (name := state.name_of.get(id(parameter))) is not None:
                yield name, parameter
