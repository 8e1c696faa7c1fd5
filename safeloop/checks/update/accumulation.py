"""Accumulated micro-batches that are not what one big batch would be."""

from __future__ import annotations

from safeloop.checks.check import Check


class AccumulationDiffers(Check):
    """The gradients of accumulated micro-batches are not those of one big batch.

    ## What it does
    `safeloop check CONFIG --accumulation` computes the gradients of the first window twice: micro-batch by micro-batch,
    weighted as the run weighs them, and once with all of them as one batch. It compares the two for each optimizer, and
    measures why they differ: with batch normalisation and dropout in eval mode, with other weights. Autocast is off.

    ## Why it is bad
    A run with accumulation is then another run than that with the batch size it stands for: a summed loss changes the
    learning rate with the number of micro-batches, a mean over tokens gives short micro-batches too much weight, batch
    normalisation sees small batches.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().sum()

    sgd = {"type": "SGD", "lr": 0.1}
    data = [torch.randn(4, 4), torch.randn(4, 4)]
    window = {"micro_batches": 2}
    run = Run(model=nn.Linear(4, 1), data=data, optimizers=sgd, accumulate=window, run={"max_steps": 1})
    run.check_accumulation()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    sgd = {"type": "SGD", "lr": 0.1}
    data = [torch.randn(4, 4), torch.randn(4, 4)]
    window = {"micro_batches": 2}
    run = Run(model=nn.Linear(4, 1), data=data, optimizers=sgd, accumulate=window, run={"max_steps": 1})
    run.check_accumulation()
    ```
    ## Fix
    As the fault says: average the loss, weigh by what it averages over (`accumulate.weight_by`, `count_tokens`), use a
    normalisation that looks at one sample at a time. Where the difference is meant, as with dropout, accept it:
    `audit.accept: {SL613: ["*"]}`.

    ## Source
    https://github.com/huggingface/transformers/pull/34191; https://unsloth.ai/blog/gradient.
    """

    code = "SL613"
    title = "accumulation differs from one big batch"


class NothingToCompare(Check):
    """Accumulation cannot be compared with one big batch.

    ## What it does
    `safeloop check CONFIG --accumulation` needs a window of two or more micro-batches that can be put together along
    their first dimension, and a loss function of its own for each phase.

    ## Why it is bad
    There would be nothing to compare, and a check that compared nothing would look as if it had passed.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    sgd = {"type": "SGD", "lr": 0.1}
    run = Run(model=nn.Linear(4, 1), data=[torch.randn(4, 4)], optimizers=sgd, run={"max_steps": 1})
    run.check_accumulation()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    sgd = {"type": "SGD", "lr": 0.1}
    data = [torch.randn(4, 4), torch.randn(4, 4)]
    window = {"micro_batches": 2}
    run = Run(model=nn.Linear(4, 1), data=data, optimizers=sgd, accumulate=window, run={"max_steps": 1})
    run.check_accumulation()
    ```
    ## Fix
    Set `accumulate.micro_batches` to 2 or more; let the data give as many micro-batches of one shape, except for their
    first dimension.

    ## Source
    safeloop's own rule.
    """

    code = "SL614"
    title = "nothing to compare accumulation with"
