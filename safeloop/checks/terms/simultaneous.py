"""Loss terms of a simultaneous step, each of which is confined to what it trains."""

from __future__ import annotations

from safeloop.checks.check import Check


class TermWithoutTrains(Check):
    """A loss term of a simultaneous step does not say what it trains.

    ## What it does
    With `simultaneous: true`, every term must declare `trains`: patterns of the parameters that its gradient may reach.

    ## Why it is bad
    Without it, nobody can tell where the term's gradient should end. In a GAN, the critic's loss would train the
    generator too.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def losses(self, batch):
            code = self.model[0](batch)
            return {"left": code.square().mean(), "right": self.model[1](code).square().mean()}

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    sgd = {"type": "SGD", "lr": 0.1}
    losses = {"left": {"trains": ["0.*"]}}
    Run(
        model=model, data=[torch.randn(8, 4)], optimizers=sgd, losses=losses, simultaneous=True, run={"max_steps": 1}
    ).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def losses(self, batch):
            code = self.model[0](batch)
            return {"left": code.square().mean(), "right": self.model[1](code).square().mean()}

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    sgd = {"type": "SGD", "lr": 0.1}
    losses = {"left": {"trains": ["0.*"]}, "right": {"trains": ["1.*"]}}
    Run(
        model=model, data=[torch.randn(8, 4)], optimizers=sgd, losses=losses, simultaneous=True, run={"max_steps": 1}
    ).fit()
    ```
    ## Fix
    Set `losses.NAME.trains`.

    ## Source
    safeloop's own rule.
    """

    code = "SL411"
    title = "loss term does not say what it trains"


class TermReachesNothingItTrains(Check):
    """A loss term of a simultaneous step reaches none of the parameters that it is to train.

    ## What it does
    Walks the term's graph on the first steps and looks for the parameters that its `trains` names. A re-entrant
    checkpoint in the graph is refused too: a pass through it cannot be confined.

    ## Why it is bad
    `backward(inputs=...)` is silent about parameters that it does not reach: they would never be trained.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def losses(self, batch):
            code = self.model[0](batch)
            return {"left": code.square().mean(), "right": self.model[1](code).square().mean()}

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    sgd = {"type": "SGD", "lr": 0.1}
    losses = {"left": {"trains": ["1.*"]}, "right": {"trains": ["0.*"]}}
    Run(
        model=model, data=[torch.randn(8, 4)], optimizers=sgd, losses=losses, simultaneous=True, run={"max_steps": 1}
    ).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def losses(self, batch):
            code = self.model[0](batch)
            return {"left": code.square().mean(), "right": self.model[1](code).square().mean()}

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    sgd = {"type": "SGD", "lr": 0.1}
    losses = {"left": {"trains": ["0.*"]}, "right": {"trains": ["1.*"]}}
    Run(
        model=model, data=[torch.randn(8, 4)], optimizers=sgd, losses=losses, simultaneous=True, run={"max_steps": 1}
    ).fit()
    ```
    ## Fix
    Correct the patterns, or restore the path from those parameters to the term; use non-re-entrant checkpoints.

    ## Source
    Documentation of `torch.autograd.backward`, argument `inputs`; measured.
    """

    code = "SL412"
    title = "loss term reaches nothing that it trains"
