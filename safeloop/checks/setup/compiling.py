"""A model that torch cannot compile."""

from __future__ import annotations

from safeloop.checks.check import Check


class CompileRefused(Check):
    """torch refuses to compile the model.

    ## What it does
    With `run.compile`, compiles the model before training and runs one forward of each phase on the first micro-batch,
    with everything restored afterwards. What torch's compiler refuses there is told before the first step.

    ## Why it is bad
    A backend that is not installed, a missing C++ compiler or code that cannot be traced would otherwise end the run
    with a trace through torch's internals.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    compiled = {"max_steps": 1, "compile": {"backend": "no_such_backend"}}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers={"type": "SGD", "lr": 0.1}, run=compiled).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    compiled = {"max_steps": 1, "compile": {"backend": "eager"}}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers={"type": "SGD", "lr": 0.1}, run=compiled).fit()
    ```
    ## Fix
    Install what the message names (`inductor` needs a C++ compiler), choose another `run.compile.backend`, or set
    `run.compile: false`.

    ## Source
    Documentation of `torch.compile` and `torch.nn.Module.compile`.
    """

    code = "SL615"
    title = "model cannot be compiled"
