"""Penalties whose values and point do not fit together, or do not depend on each other."""

from __future__ import annotations

from safeloop.checks.check import Check


class PenaltyOfWrongShape(Check):
    """The values or the point of a penalty have a shape or a kind that it cannot be computed from.

    ## What it does
    Looks at the tensors that `self.penalty` was given: `at` is a floating-point tensor `[N, ...]`; the values are one
    tensor with a row for each of the N samples.

    ## Why it is bad
    A penalty is a mean over samples of each sample's own norm. From a 0-d value nobody can tell whether it is a sum or
    a mean over the samples: the gradients of the two differ by a factor N, and a penalty is their square.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def losses(self, batch):
            gp = self.penalty(lambda x: self.model(x).mean(), at=batch)
            return {"score": self.model(batch).mean(), "gp": gp}

    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    sgd = {"type": "SGD", "lr": 0.1}
    gp = {"type": "gradient", "target": 1.0, "weight": 10.0}
    Run(
        model=model, data=[torch.randn(8, 4)], optimizers=sgd, penalties={"gp": gp}, run={"max_steps": 1}
    ).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def losses(self, batch):
            gp = self.penalty(self.model, at=batch)
            return {"score": self.model(batch).mean(), "gp": gp}

    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    sgd = {"type": "SGD", "lr": 0.1}
    gp = {"type": "gradient", "target": 1.0, "weight": 10.0}
    Run(
        model=model, data=[torch.randn(8, 4)], optimizers=sgd, penalties={"gp": gp}, run={"max_steps": 1}
    ).fit()
    ```
    ## Fix
    Give it the value of each sample, `[N]` or `[N, ...]`; of a loss, that with `reduction="none"`.

    ## Source
    https://github.com/Zeleni9/pytorch-wgan/issues/40; safeloop's own rule.
    """

    code = "SL432"
    title = "penalty of the wrong shape"


class PenaltyPointNotReached(Check):
    """The values of a penalty do not depend on the point at which they are to be differentiated.

    ## What it does
    Looks whether `at` requires grad, and whether the values were computed from it.

    ## Why it is bad
    A tensor that is made to require grad after the forward, or a copy of the one that went in, is not in the graph:
    torch raises "One of the differentiated Tensors appears to not have been used in the graph", or the gradient is
    None.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def losses(self, batch):
            score = self.model(batch)
            return {"score": score.square().mean(), "r1": self.penalty(of=score, at=batch)}

    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    sgd = {"type": "SGD", "lr": 0.1}
    r1 = {"type": "r1", "weight": 1.0}
    Run(
        model=model, data=[torch.randn(8, 4)], optimizers=sgd, penalties={"r1": r1}, run={"max_steps": 1}
    ).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def losses(self, batch):
            x = self.leaf(batch)
            score = self.model(x)
            return {"score": score.square().mean(), "r1": self.penalty(of=score, at=x)}

    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    sgd = {"type": "SGD", "lr": 0.1}
    r1 = {"type": "r1", "weight": 1.0}
    Run(
        model=model, data=[torch.randn(8, 4)], optimizers=sgd, penalties={"r1": r1}, run={"max_steps": 1}
    ).fit()
    ```
    ## Fix
    Write `x = self.leaf(x)` before the forward, run the model on that `x`, and give the same `x` as `at`. Or give the
    function itself: `self.penalty(self.model, at=x)`.

    ## Source
    Documentation of `torch.autograd.grad`; https://github.com/caogang/wgan-gp/issues/4.
    """

    code = "SL433"
    title = "penalty does not reach its point"
