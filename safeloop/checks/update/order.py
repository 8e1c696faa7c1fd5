"""Updates in the wrong order, or left out too often."""

from __future__ import annotations

from safeloop.checks.check import Check


class StepOutOfOrder(Check):
    """A step plan has its operations in an order that cannot be right.

    ## What it does
    Walks the plan node by node when it is built: each node declares what it needs, gives and voids. An update needs
    gradients that are of this step, complete and known to be finite; a clip needs the finite check before it; a
    backward needs a graph that no update has made stale.

    ## Why it is bad
    Clipping before the finite check spreads a NaN to every parameter. A gradient that is not zeroed still holds that
    of the last step. A backward after an update differentiates a graph whose weights have changed. torch says nothing
    to most of this.

    ## Bad
    ```python
    from safeloop.plan import Backward, Clip, Finite, Forward, Phase, StepPlan, Term, Update, Zero

    terms = (Term("loss"),)
    nodes = (
        Zero(("main",)),
        Forward("train", terms),
        Backward("train", terms, ("main",)),
        Clip("main", 1.0),
        Finite(("main",)),
        Update("main", "SGD", is_clipped=True),
    )
    StepPlan((Phase("train", nodes, ("main",)),))
    ```
    ## Good
    ```python
    from safeloop.plan import Backward, Clip, Finite, Forward, Phase, StepPlan, Term, Update, Zero

    terms = (Term("loss"),)
    nodes = (
        Zero(("main",)),
        Forward("train", terms),
        Backward("train", terms, ("main",)),
        Finite(("main",)),
        Clip("main", 1.0),
        Update("main", "SGD", is_clipped=True),
    )
    StepPlan((Phase("train", nodes, ("main",)),))
    ```
    ## Fix
    Put the node that gives what is missing before the one that needs it, as the fault says. A `Trainer` derives the
    order from its config and cannot get here.

    ## Source
    https://github.com/pytorch/pytorch/issues/39141; https://github.com/VGraphRNN/VGRNN/issues/4.
    """

    code = "SL601"
    title = "step out of order"


class SkippedTooOften(Check):
    """Too many updates in a row were left out because a gradient or a loss term was not finite.

    ## What it does
    With `nonfinite: {policy: skip}` it counts the steps in a row whose update was skipped, and ends the run when
    there are more than `max_consecutive`. Every finite step sets the count back to zero.

    ## Why it is bad
    One bad batch is an accident. A row of them means that nothing trains any more: the data is broken, or the weights
    have come to where every gradient overflows. The run would take its time and change nothing.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    nonfinite = {"policy": "skip", "max_consecutive": 2}
    data, run = [torch.full((8, 4), float("nan")) for _ in range(4)], {"max_steps": 4}
    Run(model=nn.Linear(4, 1), data=data, nonfinite=nonfinite, optimizers={"type": "SGD", "lr": 0.1}, run=run).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    nonfinite = {"policy": "skip", "max_consecutive": 2}
    data, run = [torch.randn(8, 4) for _ in range(4)], {"max_steps": 4}
    Run(model=nn.Linear(4, 1), data=data, nonfinite=nonfinite, optimizers={"type": "SGD", "lr": 0.1}, run=run).fit()
    ```
    ## Fix
    Mend the cause: the faults that come with this one name the terms and parameters. Raise
    `nonfinite.max_consecutive` only where so many bad batches in a row are expected.

    ## Source
    https://github.com/facebookresearch/habitat-lab/issues/2226; safeloop's own rule: a skip has a patience, and it
    ends in an error.
    """

    code = "SL602"
    title = "skipped too often"
