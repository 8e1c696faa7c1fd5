"""Derivatives of a net at its inputs that are not there, or are nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import Tensor

from safeloop.autograd.second import pieces_of
from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck, Check
from safeloop.checks.source import at
from safeloop.checks.terms.hand_made import tensors_at
from safeloop.faults import Fault


class DerivativeVanishes(CallCheck):
    """A second derivative with respect to the inputs is exactly 0 at every point: the net is piecewise linear.

    ## What it does
    Looks at the values of every second or higher derivative that `sl.derivatives` computes. Of those that are written
    by hand with `torch.autograd.grad`, on steps that are looked at in depth, it tells as a warning those that are
    exactly 0 three times, where the first derivative went through a ReLU or the like.

    ## Why it is bad
    A ReLU net is linear between its kinks. Its u_xx is connected to the parameters, so that nothing complains, and 0
    everywhere: the diffusion term of the equation is not there, and the net solves another equation.

    ## Bad
    ```python
    class Heat(sl.Trainer):
        def loss(self, batch):
            x, t = (column.requires_grad_() for column in batch.split(1, dim=1))
            u = self.model(torch.cat([x, t], 1))
            d = sl.derivatives(u, at={"x": x, "t": t})
            return (d.t - d.xx).square().mean()

    net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
    Heat(model=net, data=[torch.rand(16, 2)], optimizers={"type": "Adam"}, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Heat(sl.Trainer):
        def loss(self, batch):
            x, t = (column.requires_grad_() for column in batch.split(1, dim=1))
            u = self.model(torch.cat([x, t], 1))
            d = sl.derivatives(u, at={"x": x, "t": t})
            return (d.t - d.xx).square().mean()

    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    Heat(model=net, data=[torch.rand(16, 2)], optimizers={"type": "Adam"}, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Use a smooth activation: `nn.Tanh`, `nn.SiLU`, `nn.GELU`, `torch.sin`. Where u is rightly linear in that coordinate,
    say `sl.derivatives(..., may_vanish=True)`.

    ## Source
    M. Raissi, P. Perdikaris, G. E. Karniadakis, "Physics-informed neural networks", Journal of Computational Physics
    378 (2019), use tanh throughout; safeloop's own rule.
    """

    code = "SL445"
    title = "derivative that vanishes everywhere"
    hears = frozenset(("grad",))

    def __init__(self) -> None:
        self._times: Counter[str] = Counter()

    def hear(self, call: Call) -> Iterator[Fault]:
        """Where a derivative of a derivative is exactly 0 for the third time, and its graph is piecewise linear."""
        outputs, inputs = tensors_at(call, 0, "outputs"), tensors_at(call, 1, "inputs")
        place = at(call.site, "torch.autograd.grad")
        if not any(m.kind == "derivative" for t in outputs for m in call.tape.marks_of(t)) or self._times[place] > 2:
            return
        found = [t for t in call.out if isinstance(t, Tensor)] if isinstance(call.out, tuple) else []
        if not found or any(call.tape.live(t) for t in inputs) or any(bool(t.detach().any()) for t in found):
            return
        pieces = pieces_of(outputs)
        if not pieces or not any(bool(t.detach().any()) for t in outputs):
            return
        self._times[place] += 1
        if self._times[place] == 3:
            size = sum(t.numel() for t in found)
            yield self.fault(
                f"a second derivative with respect to an input is exactly 0 at all {size} points, on 3 steps; the "
                f"graph of the first one holds {', '.join(f'`{name}`' for name in pieces)}",
                where=place,
                why="the net is piecewise linear in its inputs, as with ReLU: its second derivatives are 0 wherever "
                "they exist, and the term that holds them trains nothing",
                fix="use a smooth activation (nn.Tanh, nn.SiLU, nn.GELU, torch.sin)",
                severity="warning",
            )


class NothingToDerive(Check):
    """A derivative is asked for at something that the output was not computed from.

    ## What it does
    Looks, when `sl.derivatives` is called, whether the output has a graph and each coordinate requires grad; and, at
    the first derivative, whether a path leads to each coordinate.

    ## Why it is bad
    torch says "One of the differentiated Tensors appears to not have been used in the graph", or, with
    `allow_unused=True`, gives None, which is easily taken for 0: a term of the equation is then silently left out.

    ## Bad
    ```python
    class Heat(sl.Trainer):
        def loss(self, batch):
            x, t = batch.split(1, dim=1)
            d = sl.derivatives(self.model(batch), at={"x": x, "t": t})
            return (d.t - d.xx).square().mean()

    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    Heat(model=net, data=[torch.rand(16, 2)], optimizers={"type": "Adam"}, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Heat(sl.Trainer):
        def loss(self, batch):
            x, t = (column.requires_grad_() for column in batch.split(1, dim=1))
            d = sl.derivatives(self.model(torch.cat([x, t], 1)), at={"x": x, "t": t})
            return (d.t - d.xx).square().mean()

    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    Heat(model=net, data=[torch.rand(16, 2)], optimizers={"type": "Adam"}, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Cut the coordinates out first, call `requires_grad_()` on each, and compute the output from these very tensors. In
    `metrics`, mark the method with `@sl.needs_grad`.

    ## Source
    safeloop's own rule.
    """

    code = "SL446"
    title = "derivative at what the output does not depend on"
