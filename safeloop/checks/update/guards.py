"""What a loss function does that only the loop may do."""

from __future__ import annotations

from safeloop.checks.check import Check


class GradientsTouched(Check):
    """A loss function drops or changes gradients that the loop is adding up.

    ## What it does
    With `accumulate`, compares each parameter's `.grad` before and after every call of the loss function: there or
    not, the same tensor, its version counter. Without, it sees on audited steps that no gradient is there yet. Cost:
    about 0.2 us for each parameter and micro-batch.

    ## Why it is bad
    `model.zero_grad()` inside the loss function drops all micro-batches of the window but the last; a `backward()`
    there adds gradients that are counted twice. Either trains on, with the wrong gradient.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            self.model.zero_grad()
            return self.model(batch).square().mean()

    data, sgd = list(torch.randn(4, 8, 4)), {"type": "SGD", "lr": 0.1}
    window, run = {"micro_batches": 2}, {"max_steps": 2}
    Run(model=nn.Linear(4, 1), data=data, optimizers=sgd, accumulate=window, run=run).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    data, sgd = list(torch.randn(4, 8, 4)), {"type": "SGD", "lr": 0.1}
    window, run = {"micro_batches": 2}, {"max_steps": 2}
    Run(model=nn.Linear(4, 1), data=data, optimizers=sgd, accumulate=window, run=run).fit()
    ```
    ## Fix
    Leave zeroing, backward passes and clipping to the loop: `accumulate`, `losses` and `optimizers.NAME.max_norm` say
    what it does. A gradient with respect to an input comes from `torch.autograd.grad(loss, x)`, which touches no
    parameter.

    ## Source
    https://github.com/huggingface/diffusers/pull/10553; https://github.com/tatsu-lab/alpaca_farm/issues/57.
    """

    code = "SL617"
    title = "gradients touched by the loss function"


class StepOutsideThePlan(Check):
    """Somebody else than the loop steps one of its optimizers.

    ## What it does
    While a run lasts, a hook on each optimizer refuses every `step()` that is not the plan's own, before it changes a
    weight. It costs nothing on the direct path to fused kernels, which does not pass through `step()`.

    ## Why it is bad
    The weights move in the middle of a step: the graph that is then differentiated belongs to other weights. torch
    reports that for most optimizers, and not for fused ones, which leave version counters as they are. The update is
    also made without finite check and clipping, and twice.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            loss = self.model(batch).square().mean()
            optimizer.step()
            return loss

    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    Run(model=model, data=[torch.randn(8, 4)], optimizers=optimizer, run={"max_steps": 2}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    Run(model=model, data=[torch.randn(8, 4)], optimizers=optimizer, run={"max_steps": 2}).fit()
    ```
    ## Fix
    Take the call out: the plan updates each optimizer. What must be updated several times a step is a phase with
    `repeat`; in a `custom_step`, call `ops.update(NAME)`.

    ## Source
    Measured: a backward pass through a graph that a fused optimizer has made stale gave gradients that were 195 % off,
    without an error.
    """

    code = "SL618"
    title = "optimizer stepped outside the plan"
