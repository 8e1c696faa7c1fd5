"""Derivatives of a net at its inputs that are not there, or are nothing."""

from __future__ import annotations

from safeloop.checks.check import Check


class DerivativeVanishes(Check):
    """A second derivative with respect to the inputs is exactly 0 at every point: the net is piecewise linear.

    ## What it does
    Looks at the values of every second or higher derivative that `sl.derivatives` computes.

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
