"""Loss terms that the config declares and the loss function does not return."""

from __future__ import annotations

from collections.abc import Iterator

from safeloop.checks.check import Check
from safeloop.checks.views import TermsView
from safeloop.checks.wording import listed, suggestion
from safeloop.faults import Fault


class DeclaredTermMissing(Check):
    """The config declares a loss term that the loss function does not return.

    ## What it does
    Compares the names under `losses:` with the names that the first batch returns. A term with
    `may_be_constant: true` may stay away from a batch.

    ## Why it is bad
    A name that is misspelled on one side takes its weight and its `trains:` with it: the term that is returned counts
    with weight 1, and what was declared has no effect.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def losses(self, batch):
            return {"recon": F.mse_loss(self.model(batch), batch)}

    model, data = nn.Linear(4, 4), [torch.randn(8, 4)]
    losses = {"reconn": {"weight": 0.5}}
    Run(model=model, data=data, losses=losses, optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def losses(self, batch):
            return {"recon": F.mse_loss(self.model(batch), batch)}

    model, data = nn.Linear(4, 4), [torch.randn(8, 4)]
    losses = {"recon": {"weight": 0.5}}
    Run(model=model, data=data, losses=losses, optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Give the term the same name on both sides, take it out of `losses:`, or set `losses.NAME.may_be_constant: true`
    where only some batches return it.

    ## Source
    safeloop's own rule.
    """

    code = "SL407"
    title = "declared loss term is missing"

    @classmethod
    def find(cls, view: TermsView) -> Iterator[Fault]:
        """One fault for each such term."""
        returned = list(view.terms)
        undeclared = [name for name in returned if name not in view.declared]
        for name in view.declared:
            if name in view.terms or name in view.constants_allowed:
                continue
            yield cls.fault(
                f"`losses.{name}` is declared, but the loss function did not return it{suggestion(name, undeclared)}",
                where=f"{view.source}; returned: {listed(returned) or 'nothing'}",
                fix=f"give the term the same name on both sides, take `losses.{name}` out, or set "
                f"`losses.{name}.may_be_constant: true` where only some batches return it",
                names=(name,),
            )
