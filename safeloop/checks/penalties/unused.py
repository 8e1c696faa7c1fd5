"""Penalties that are computed and never join a loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from safeloop.autograd.lineage import Mark
from safeloop.autograd.numbers import number_of
from safeloop.autograd.sites import Site
from safeloop.autograd.survey import survey
from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck
from safeloop.checks.source import at
from safeloop.faults import Fault

_PATIENCE = 6
_TIMES = 3
_SCALARS = ("mean", "sum", "norm", "mse_loss", "l1_loss", "smooth_l1_loss")


@dataclass(slots=True)
class _Gradient:
    """What a line of the user's has differentiated with `create_graph=True`."""

    nodes: set[int] = field(default_factory=set)
    """sequence numbers of what it gave, since a loss used it last"""
    scalar: Site | None = None
    """the line that made one number of it"""
    calls: int = 0
    passes: int = 0
    """backward passes that came by without it"""


class PenaltyNotInLoss(CallCheck):
    """A penalty on a gradient is computed with `create_graph=True`, and no loss contains it.

    ## What it does
    Follows what `torch.autograd.grad(..., create_graph=True)` gives and the numbers that are made of it, and tells
    where six backward passes, and no further differentiation, came by without any of it. Cost: none beyond the tape of
    calls.

    ## Why it is bad
    The penalty is paid for, twice, and constrains nothing: the line that adds it to the loss was lost.

    ## Bad
    ```python
    critic = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
    with sl.audit(model=critic, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(8):
            x = torch.randn(8, 4, requires_grad=True)
            (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
            penalty = gradient.square().sum(1).mean()
            loss = critic(torch.randn(8, 4)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            audit.step()
    ```
    ## Good
    ```python
    critic = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
    with sl.audit(model=critic, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(8):
            x = torch.randn(8, 4, requires_grad=True)
            (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
            penalty = gradient.square().sum(1).mean()
            loss = critic(torch.randn(8, 4)).mean() + 10.0 * penalty
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            audit.step()
    ```
    ## Fix
    Add the penalty to the loss. Where it is only to be watched, leave `create_graph` off.

    ## Source
    https://github.com/LixiangHan/GANs-for-1D-Signal/issues/7.
    """

    code = "SL440"
    title = "penalty that no loss contains"
    severity = "warning"
    hears = frozenset(("grad", *_SCALARS))

    def __init__(self) -> None:
        self._found: dict[Site, _Gradient] = {}
        self._used: set[Site] = set()

    def hear(self, call: Call) -> Iterator[Fault]:
        """Note gradients that may be differentiated, and the numbers made of them."""
        if call.name == "grad":
            self._differentiated(call)
        elif self._found and call.grad_mode and getattr(call.out, "ndim", 1) == 0:
            for tensor in call.tensors:
                for mark in call.tape.marks_of(tensor):
                    if mark.kind == "differentiable" and mark.site in self._found and call.site is not None:
                        self._found[mark.site].scalar = call.site
        return iter(())

    def visited(self, numbers: frozenset[int] | set[int]) -> Iterator[Fault]:
        """The faults of a backward pass that visits these nodes."""
        for site, gradient in list(self._found.items()):
            if gradient.nodes & numbers:
                self._used.add(site)
                del self._found[site]
                continue
            gradient.passes += 1
            gradient.nodes.clear()
            if gradient.passes == _PATIENCE and gradient.calls >= _TIMES and gradient.scalar is not None:
                yield self.fault(
                    "a penalty is computed from a gradient with `create_graph=True`, and no loss contains it",
                    where=f"{at(gradient.scalar, 'the penalty')}; the gradient: {at(site, 'torch.autograd.grad')}",
                    why=f"{_PATIENCE} backward passes went by without it: it costs a second pass and constrains "
                    "nothing",
                    fix="add it to the loss (`loss = loss + weight * penalty`), or leave `create_graph` off where it "
                    "is only watched",
                )

    def _differentiated(self, call: Call) -> None:
        roots = [tensor for tensor in call.tensors if tensor.grad_fn is not None]
        if self._found and roots:
            numbers = survey(*roots).numbers
            for again in [known for known, gradient in self._found.items() if gradient.nodes & numbers]:
                self._used.add(again)  # differentiated again: a product with second derivatives
                del self._found[again]
        site = call.site
        if site is None or site in self._used or not call.is_direct or not call.kwargs.get("create_graph"):
            return
        given = [tensor for tensor in call.out if tensor is not None and tensor.grad_fn is not None]
        if not any(call.tape.live(tensor) for tensor in given):
            return
        gradient = self._found.setdefault(site, _Gradient())
        gradient.calls += 1
        for tensor in given:
            gradient.nodes.add(number_of(tensor.grad_fn))
            call.tape.mark(tensor, Mark("differentiable", "grad", "", site, call.tape.module, 0))
