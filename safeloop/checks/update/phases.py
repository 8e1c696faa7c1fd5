"""Phases and the optimizers that they train."""

from __future__ import annotations

from safeloop.checks.check import Check


class PhaseTrainsNoOptimizer(Check):
    """A phase trains something that is no optimizer of the run.

    ## What it does
    Compares the `trains` of every phase with the names of the optimizers, before the first step.

    ## Why it is bad
    The phase would update nothing, or not what was meant.

    ## Bad
    ```python
    class Run(sl.Trainer):
        @sl.phase(trains="critc")
        def fit_critic(self, batch):
            return {"value": self.model(batch).square().mean()}

    optimizers = {"critic": {"type": "SGD", "lr": 0.1}}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=optimizers, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        @sl.phase(trains="critic")
        def fit_critic(self, batch):
            return {"value": self.model(batch).square().mean()}

    optimizers = {"critic": {"type": "SGD", "lr": 0.1}}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=optimizers, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Name optimizers of the `optimizers:` section in `trains`.

    ## Source
    safeloop's own rule.
    """

    code = "SL603"
    title = "phase trains no optimizer"


class OptimizerNeverTrained(Check):
    """An optimizer is trained by no phase.

    ## What it does
    Looks for optimizers that no phase names in its `trains`, before the first step.

    ## Why it is bad
    Its parameters keep their initial values for ever, while the rest of the model learns around them.

    ## Bad
    ```python
    class Run(sl.Trainer):
        @sl.phase(trains="critic")
        def fit_critic(self, batch):
            return {"value": self.model(batch).square().mean()}

    optimizers = {
        "critic": {"type": "SGD", "lr": 0.1, "params": ["1.*"]},
        "actor": {"type": "SGD", "lr": 0.1, "params": ["0.*"]},
    }
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    Run(model=model, data=[torch.randn(8, 4)], optimizers=optimizers, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        @sl.phase(trains="critic")
        def fit_critic(self, batch):
            return {"value": self.model(batch).square().mean()}

        @sl.phase(trains="actor")
        def fit_actor(self, batch):
            return {"gain": -self.model(batch).mean()}

    optimizers = {
        "critic": {"type": "SGD", "lr": 0.1, "params": ["1.*"]},
        "actor": {"type": "SGD", "lr": 0.1, "params": ["0.*"]},
    }
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    Run(model=model, data=[torch.randn(8, 4)], optimizers=optimizers, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Add the optimizer to the `trains` of a phase, or list its parameters under `frozen:`.

    ## Source
    https://github.com/huggingface/accelerate/issues/2665; safeloop's own rule.
    """

    code = "SL604"
    title = "optimizer that no phase trains"
