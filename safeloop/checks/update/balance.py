"""Weights that cannot be balanced."""

from __future__ import annotations

from safeloop.checks.check import Check


class NothingToBalance(Check):
    """`balance` has no gradients to compare: the terms share no features, or the step is not one that it can measure.

    ## What it does
    Looks, before the first step, for what `balance` cannot be combined with; and with `at: cut`, on each step that is
    due, for features that the terms of a phase share.

    ## Why it is bad
    The weights would stay as they are, while the config says that they follow the gradients.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def losses(self, batch):
            return {"inside": self.model(batch).square().mean(), "edge": self.model(batch[:2] + 1).square().mean()}

    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    balance, sgd = {"every": 1, "at": "cut"}, {"type": "SGD", "lr": 0.1}
    Run(model=net, data=[torch.randn(8, 4)], optimizers=sgd, balance=balance, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def losses(self, batch):
            return {"inside": self.model(batch).square().mean(), "edge": self.model(batch[:2] + 1).square().mean()}

    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    balance, sgd = {"every": 1, "at": "parameters"}, {"type": "SGD", "lr": 0.1}
    Run(model=net, data=[torch.randn(8, 4)], optimizers=sgd, balance=balance, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Set `balance.at: parameters`, which asks for no shared features. Take `balance` out of a run with a `custom_step`;
    with `combine` or `simultaneous`, only `at: parameters` can be measured.

    ## Source
    safeloop's own rule.
    """

    code = "SL626"
    title = "nothing to balance"
