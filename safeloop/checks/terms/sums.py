"""Sums one part of which trains nothing."""

from __future__ import annotations

from collections.abc import Iterator

from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck
from safeloop.checks.source import at
from safeloop.checks.wording import listed
from safeloop.faults import Fault


class PartOfSumWithoutGradient(CallCheck):
    """A part of a loss was computed with grad mode off, and is added to a part that has a gradient.

    ## What it does
    Hears sums of two scalars on the steps that are looked at in depth: one has a graph; the other has none, and its
    value was computed from parameters under `no_grad` or inference mode.

    ## Why it is bad
    The part is in the loss that is logged and trains nothing. Where the same parameters are reached by the other part,
    no gradient is missing, so that nothing else shows it.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            fit = self.model(batch).square().mean()
            with torch.no_grad():
                decay = self.model.weight.square().sum()
            return fit + decay

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 4), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            fit = self.model(batch).square().mean()
            decay = self.model.weight.square().sum()
            return fit + decay

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 4), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Compute the part with grad mode on. What is only to be looked at belongs in `metrics`, or in the log beside the
    loss; write `.detach()` where a constant is meant, which says so.

    ## Source
    Documentation of `torch.no_grad`.
    """

    code = "SL425"
    title = "part of a sum without gradient"
    severity = "warning"
    hears = frozenset(("add", "__add__", "__radd__", "add_", "__iadd__", "sub", "__sub__"))

    def __init__(self) -> None:
        self._told: set[str] = set()

    def hear(self, call: Call) -> Iterator[Fault]:
        """Where a scalar that was computed from parameters under no_grad is added to one with a graph."""
        scalars = [t for t in call.tensors if not t.dim()]
        if len(scalars) < 2 or not any(t.requires_grad and call.tape.live(t) for t in scalars):
            return
        for tensor in scalars:
            cuts = [m for m in call.tape.marks_of(tensor) if m.kind == "cut"]
            if tensor.requires_grad or not cuts or not all(m.reason.startswith(_OFF) for m in cuts):
                continue
            place = at(cuts[0].site, "a line under no_grad")
            if place in self._told:
                continue
            self._told.add(place)
            names = call.tape.names_of(cuts[0].live)
            yield self.fault(
                f"a part of the loss that was computed from {listed(names)} has no graph, value {float(tensor):.4g}: "
                "it is a constant there",
                where=f"{place}; added at {at(call.site, 'the loss')}",
                why=f"{cuts[0].reason}: its contribution to their gradient is missing",
                fix="compute it with grad mode on, or leave it out of the loss; write `.detach()` where a constant is "
                "meant",
                names=names,
            )


_OFF = ("no_grad", "inference mode")
