"""Readings that cannot be taken: watched modules that are not there, curvature without second derivatives."""

from __future__ import annotations

from safeloop.checks.check import Check


class WatchRefused(Check):
    """`log.watch` names no module of the model, or modules that a compiled model does not show.

    ## What it does
    Compares the patterns of `log.watch` with the names of the model's modules, before the first step.

    ## Why it is bad
    The curve that was asked for would never appear, and nobody would say why.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    log = {"watch": ["encoder.2"]}
    Run(model=net, data=[torch.randn(8, 4)], optimizers={"type": "Adam"}, run={"max_steps": 1}, log=log).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    log = {"watch": ["1"]}
    Run(model=net, data=[torch.randn(8, 4)], optimizers={"type": "Adam"}, run={"max_steps": 1}, log=log).fit()
    ```
    ## Fix
    Name modules as `model.named_modules()` does, patterns allowed. Any other tensor of the forward is watched by
    `self.watch(name, tensor)` in the loss function, also with `run.compile`.

    ## Source
    safeloop's own rule.
    """

    code = "SL447"
    title = "nothing to watch"


class CurvatureUnavailable(Check):
    """`log.curvature` cannot be read: an operation of the loss has no second derivative.

    ## What it does
    Catches the error of torch at the first reading, reports it once, and takes no more readings. Training goes on.

    ## Why it is bad
    The curve that was asked for stays empty.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return torch.cdist(self.model(batch), batch).mean()

    log, run = {"curvature": {"every": 1}, "every": 1}, {"max_steps": 1}
    Run(model=nn.Linear(4, 4), data=[torch.randn(8, 4)], optimizers={"type": "Adam"}, run=run, log=log).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return (self.model(batch) - batch).square().mean()

    log, run = {"curvature": {"every": 1}, "every": 1}, {"max_steps": 1}
    Run(model=nn.Linear(4, 4), data=[torch.randn(8, 4)], optimizers={"type": "Adam"}, run=run, log=log).fit()
    ```
    ## Fix
    Write the operation with others that have a second derivative (SL305 lists them), or take `log.curvature` out.

    ## Source
    https://pytorch.org/docs/stable/notes/extending.html, "double backward".
    """

    code = "SL448"
    title = "curvature that cannot be read"
    severity = "warning"
