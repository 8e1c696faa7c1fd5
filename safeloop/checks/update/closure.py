"""Optimizers that compute the loss several times in one update."""

from __future__ import annotations

from safeloop.checks.check import Check


class ClosureRefused(Check):
    """An optimizer that needs a closure stands where it cannot work.

    ## What it does
    LBFGS evaluates the loss several times in one update, and the loop owns that closure. Refused before the first step:
    LBFGS in a phase with another optimizer, in a phase that repeats, with gradient clipping, or with fp16.

    ## Why it is bad
    Every evaluation must see the same function. Another optimizer would move weights in between, clipping and the fp16
    scale would falsify the gradients from which the curvature is estimated.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    optimizers = {"type": "LBFGS", "lr": 1.0, "max_norm": 1.0}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=optimizers, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    optimizers = {"type": "LBFGS", "lr": 1.0, "line_search_fn": "strong_wolfe"}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=optimizers, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Give LBFGS a phase of its own that does not repeat, in fp32 or bf16, without clipping.

    ## Source
    Documentation of `torch.optim.LBFGS`; https://github.com/Lightning-AI/pytorch-lightning/issues/4083.
    """

    code = "SL610"
    title = "optimizer with a closure cannot work here"


class ObjectiveNotFixed(Check):
    """LBFGS minimises a loss that changes from one evaluation to the next.

    ## What it does
    Looks for dropout and batch normalisation in training mode in a model that LBFGS trains.

    ## Why it is bad
    Each evaluation of one update draws another mask, or moves the running statistics: the line search compares values
    of different functions, and the curvature estimate is noise.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    Run(model=model, data=[torch.randn(8, 4)], optimizers={"type": "LBFGS"}, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    Run(model=model, data=[torch.randn(8, 4)], optimizers={"type": "LBFGS"}, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Take the layer out, put it into eval mode, or train with another optimizer.

    ## Source
    safeloop's own rule; measured: strong Wolfe with fresh masks ends at another loss than with fixed ones.
    """

    code = "SL611"
    title = "LBFGS on a loss that is not fixed"
    severity = "warning"


class TokensWithoutCount(Check):
    """Micro-batches are to be weighted by tokens, and nothing says how many tokens a micro-batch has.

    ## What it does
    With `accumulate.weight_by: tokens`, looks for a `count_tokens` of the Trainer, before the first step.

    ## Why it is bad
    Means over micro-batches with different numbers of tokens are not the mean over all tokens: gradients were 31 %
    wrong in a measured case.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    accumulate = {"micro_batches": 2, "weight_by": "tokens"}
    sgd = {"type": "SGD", "lr": 0.1}
    data = [torch.randn(8, 4), torch.randn(2, 4)]
    Run(model=nn.Linear(4, 1), data=data, optimizers=sgd, accumulate=accumulate, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

        def count_tokens(self, batch):
            return batch.numel()

    accumulate = {"micro_batches": 2, "weight_by": "tokens"}
    sgd = {"type": "SGD", "lr": 0.1}
    data = [torch.randn(8, 4), torch.randn(2, 4)]
    Run(model=nn.Linear(4, 1), data=data, optimizers=sgd, accumulate=accumulate, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Override `count_tokens(self, batch)` to return the number of tokens that the loss averages over, or weight by
    samples.

    ## Source
    https://github.com/huggingface/transformers/pull/34191.
    """

    code = "SL612"
    title = "tokens without a count"
