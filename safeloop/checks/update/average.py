"""Averages of weights that cannot be taken."""

from __future__ import annotations

from safeloop.checks.check import Check


class NonFiniteWeights(Check):
    """A weight is NaN or infinite after an update, and would have reached the average of the weights.

    ## What it does
    With a section `average`, it looks at the norms of all parameters and running statistics before they are averaged.
    The average stays as it was.

    ## Why it is bad
    Finite gradients can still overflow a weight, when the learning rate is far too large. One infinity in a moving
    average never leaves it again.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean() * 1e20

    optimizers = {"type": "SGD", "lr": 1e30}
    run = {"max_steps": 1}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=optimizers, average={"type": "ema"}, run=run).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    optimizers = {"type": "SGD", "lr": 0.1}
    run = {"max_steps": 1}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=optimizers, average={"type": "ema"}, run=run).fit()
    ```
    ## Fix
    Lower the learning rate, or clip the gradient with `max_norm`. Where a running statistic is named, a batch was not
    finite.

    ## Source
    safeloop's own rule.
    """

    code = "SL605"
    title = "non-finite weights"


class ModelCannotBeCopied(Check):
    """Weights are to be averaged, and the model cannot be copied.

    ## What it does
    Copies the model with `copy.deepcopy` before the first step, as `torch.optim.swa_utils.AveragedModel` does.

    ## Why it is bad
    The average needs a model of its own, so that it can be evaluated without touching the live weights.

    ## Bad
    ```python
    class Logged(nn.Linear):
        def __init__(self):
            super().__init__(4, 1)
            self.file = open("log.txt", "w")

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    model, optimizers = Logged(), {"type": "SGD", "lr": 0.1}
    model.file.close()
    average, run = {"type": "ema"}, {"max_steps": 1}
    Run(model=model, data=[torch.randn(8, 4)], optimizers=optimizers, average=average, run=run).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    model, optimizers = nn.Linear(4, 1), {"type": "SGD", "lr": 0.1}
    average, run = {"type": "ema"}, {"max_steps": 1}
    Run(model=model, data=[torch.randn(8, 4)], optimizers=optimizers, average=average, run=run).fit()
    ```
    ## Fix
    Keep open files, locks and tensors with a graph out of the model, or give the class that holds them `__deepcopy__`.

    ## Source
    Python's `copy` module; `torch.optim.swa_utils.AveragedModel`.
    """

    code = "SL606"
    title = "model cannot be copied"
