"""Gradients of loss terms that cannot be combined, or not be told apart."""

from __future__ import annotations

from safeloop.checks.check import Check


class TermsShareNoFeatures(Check):
    """Gradients are to be combined at the shared cut, and the terms have none.

    ## What it does
    With `combine.at: cut`, looks at the graph of every step for tensors that at least two terms were made from.

    ## Why it is bad
    Terms that meet in parameters only, because each runs the model anew, would be summed as if `combine` were not
    there.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def losses(self, batch):
            return {"low": self.model(batch).square().mean(), "high": (self.model(batch) - 1).square().mean()}

    sgd = {"type": "SGD", "lr": 0.1}
    combine = {"type": "pcgrad", "at": "cut"}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=sgd, combine=combine, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def losses(self, batch):
            output = self.model(batch)
            return {"low": output.square().mean(), "high": (output - 1).square().mean()}

    sgd = {"type": "SGD", "lr": 0.1}
    combine = {"type": "pcgrad", "at": "cut"}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=sgd, combine=combine, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Compute the shared features once and make all terms from them, or set `combine.at: parameters`.

    ## Source
    safeloop's own rule.
    """

    code = "SL620"
    title = "terms share no features"


class CombinationFailed(Check):
    """The rule of `combine` gave no usable combination of the terms' gradients.

    ## What it does
    Looks at the factors that the rule gives to the terms, on every step, before any `.grad` is used.

    ## Why it is bad
    Gradients of extremely different size leave a rule no room: its solver fails, or its factors are not finite, and an
    update would destroy the weights.

    ## Bad
    ```python
    from unittest.mock import patch

    class Run(sl.Trainer):
        def losses(self, batch):
            output = self.model(batch)
            return {"low": output.square().mean(), "high": (output - 1).square().mean()}

    sgd = {"type": "SGD", "lr": 0.1}
    run = Run(
        model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=sgd, combine={"type": "mgda"}, run={"max_steps": 1}
    )
    nothing = torch.full((2,), float("nan"), dtype=torch.float64)
    with patch("torchjd.aggregation.MGDAWeighting.forward", return_value=nothing):  # as if the rule had failed
        run.fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def losses(self, batch):
            output = self.model(batch)
            return {"low": output.square().mean(), "high": (output - 1).square().mean()}

    sgd = {"type": "SGD", "lr": 0.1}
    run = Run(
        model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=sgd, combine={"type": "mgda"}, run={"max_steps": 1}
    )
    run.fit()
    ```
    ## Fix
    Bring the terms closer to each other with `losses.<name>.weight`, or choose another `combine.type`.

    ## Source
    safeloop's own rule.
    """

    code = "SL621"
    title = "combination of gradients failed"


class TermsInseparable(Check):
    """Each term's gradient is wanted by itself, and the graph runs through a re-entrant checkpoint.

    ## What it does
    With `log.exact_term_norms` or `combine`, looks for such a checkpoint in the graph of each term.

    ## Why it is bad
    A re-entrant checkpoint hides its parameters and runs a backward pass of its own into their `.grad`: asked for one
    term's gradient alone, torch gives none, and says nothing.

    ## Bad
    ```python
    from torch.utils.checkpoint import checkpoint

    class Run(sl.Trainer):
        def losses(self, batch):
            output = checkpoint(self.model, batch.requires_grad_(), use_reentrant=True)
            return {"low": output.square().mean(), "high": (output - 1).square().mean()}

    sgd = {"type": "SGD", "lr": 0.1}
    log = {"exact_term_norms": {"every": 1}}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=sgd, log=log, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    from torch.utils.checkpoint import checkpoint

    class Run(sl.Trainer):
        def losses(self, batch):
            output = checkpoint(self.model, batch, use_reentrant=False)
            return {"low": output.square().mean(), "high": (output - 1).square().mean()}

    sgd = {"type": "SGD", "lr": 0.1}
    log = {"exact_term_norms": {"every": 1}}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=sgd, log=log, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Use `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`.

    ## Source
    Documentation of `torch.utils.checkpoint`.
    """

    code = "SL622"
    title = "terms cannot be told apart"
