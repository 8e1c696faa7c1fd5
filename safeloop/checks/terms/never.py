"""Loss terms that are permitted to be missing, and are never there."""

from __future__ import annotations

from safeloop.checks.check import Check


class TermNeverActive(Check):
    """A loss term that may be constant has never reached a parameter.

    ## What it does
    Counts, for each term with `may_be_constant: true`, the micro-batches from the start of the run on which it was
    missing, a constant, or a graph without a parameter that the phase trains. After 100 of them, none other between,
    it warns. `safety/inactive/NAME` in the log is the fraction of the steps since the last log. Cost: a walk over the
    term's graph, until it has reached a parameter once.

    ## Why it is bad
    The term trains nothing, and its permission hides it: the cure `torch.tensor(0.0, requires_grad=True)`, a margin
    that no pair violates, a name that is misspelt on one side.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def losses(self, batch):
            error = F.mse_loss(self.model(batch), batch)
            margin = (0.5 - error).clamp(min=0) if error.isnan() else torch.tensor(0.0, requires_grad=True)
            return {"fit": error, "margin": margin}

    sgd, losses = {"type": "SGD", "lr": 0.1}, {"margin": {"may_be_constant": True}}
    data = [torch.randn(8, 4)]
    Run(model=nn.Linear(4, 4), data=data, losses=losses, optimizers=sgd, run={"max_steps": 100}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def losses(self, batch):
            error = F.mse_loss(self.model(batch), batch)
            margin = (error - 0.5).clamp(min=0) if error > 0.5 else torch.tensor(0.0, requires_grad=True)
            return {"fit": error, "margin": margin}

    sgd, losses = {"type": "SGD", "lr": 0.1}, {"margin": {"may_be_constant": True}}
    data = [torch.randn(8, 4)]
    Run(model=nn.Linear(4, 4), data=data, losses=losses, optimizers=sgd, run={"max_steps": 100}).fit()
    ```
    ## Fix
    Correct the condition, the graph or the name; take the term out where it is not needed.

    ## Source
    safeloop's own rule.
    """

    code = "SL415"
    title = "loss term never reached a parameter"
    severity = "warning"
