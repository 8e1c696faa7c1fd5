"""A custom step that asks for what it cannot have."""

from __future__ import annotations

from safeloop.checks.check import Check


class CustomStepRefused(Check):
    """A `custom_step` uses its operations in a way that they do not allow.

    ## What it does
    Refuses an optimizer that is not there, terms that are no dict, operations after the end of the step, a backward
    without `ops.autocast()` in bf16 and fp16, and what a custom step excludes: LBFGS, `accumulate`, an evaluated loss.

    ## Why it is bad
    The step would leave out what the config asks for, and nothing would say so.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def custom_step(self, ops, batch):
            ops.zero("critic")
            ops.backward({"square": self.model(batch).square().mean()})
            ops.update("critic")

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class SharpnessAware(sl.Trainer):
        def custom_step(self, ops, batch):
            ops.zero("main")
            ops.backward({"here": self.model(batch).square().mean()})
            weights = list(self.model.parameters())
            with torch.no_grad():
                before = [w.clone() for w in weights]
                norm = torch.linalg.vector_norm(torch.stack([w.grad.norm() for w in weights]))
                for w in weights:
                    w.add_(w.grad * (0.05 / norm))
            ops.zero("main")
            ops.backward({"uphill": self.model(batch).square().mean()})
            with torch.no_grad():
                for w, old in zip(weights, before):
                    w.copy_(old)
            ops.update("main")

    sgd = {"type": "SGD", "lr": 0.1}
    data = [torch.randn(8, 4)]
    SharpnessAware(model=nn.Linear(4, 1), data=data, optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Fix
    As the fault says. The good example is sharpness-aware minimisation: two passes, the second one with moved weights.

    ## Source
    safeloop's own rule. P. Foret et al., "Sharpness-Aware Minimization", ICLR 2021.
    """

    code = "SL616"
    title = "custom step asks for what it cannot have"
