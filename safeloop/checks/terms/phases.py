"""Phases whose losses do not reach what they train."""

from __future__ import annotations

from safeloop.checks.check import Check


class PhaseReachesNothing(Check):
    """A phase trains an optimizer none of whose parameters its losses reach.

    ## What it does
    After the first backward pass of a declared phase, looks for optimizers of its `trains` that got no gradient at all.

    ## Why it is bad
    The phase updates nothing of that optimizer; with another phase that does, nobody would notice.

    ## Bad
    ```python
    class Run(sl.Trainer):
        @sl.phase(trains=["left", "right"])
        def fit_both(self, batch):
            return {"value": self.model[0](batch).square().mean()}

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizers = {
        "left": {"type": "SGD", "lr": 0.1, "params": ["0.*"]},
        "right": {"type": "SGD", "lr": 0.1, "params": ["1.*"]},
    }
    Run(model=model, data=[torch.randn(8, 4)], optimizers=optimizers, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        @sl.phase(trains=["left", "right"])
        def fit_both(self, batch):
            return {"value": self.model(batch).square().mean()}

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizers = {
        "left": {"type": "SGD", "lr": 0.1, "params": ["0.*"]},
        "right": {"type": "SGD", "lr": 0.1, "params": ["1.*"]},
    }
    Run(model=model, data=[torch.randn(8, 4)], optimizers=optimizers, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Take the optimizer out of the phase's `trains`, or look for a `detach()` between its parameters and the losses.

    ## Source
    https://github.com/huggingface/accelerate/issues/2665; safeloop's own rule.
    """

    code = "SL413"
    title = "phase does not reach what it trains"
