"""Patterns over parameter names."""

from __future__ import annotations

from collections.abc import Iterator

from safeloop.checks.check import Check
from safeloop.checks.views import SetupView
from safeloop.checks.wording import counted, listed, suggestion
from safeloop.faults import Fault


class PatternMatchesNothing(Check):
    """A pattern over parameter names matches no parameter.

    ## What it does
    Compares each pattern of `optimizers.NAME.params` and `frozen` with the model's full parameter names, tied names
    included. `*` stands for any characters, dots too.

    ## Why it is bad
    The pattern is misspelled or the model has changed: what it was meant for has another owner, or none.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    optimizers = {"type": "SGD", "lr": 0.1}
    run = {"max_steps": 1}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=optimizers, frozen=["bais"], run=run).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    optimizers = {"type": "SGD", "lr": 0.1}
    run = {"max_steps": 1}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=optimizers, frozen=["bias"], run=run).fit()
    ```
    ## Fix
    Correct the pattern, or take it out. The printed plan lists every name.

    ## Source
    Python's `fnmatch.fnmatchcase`; safeloop's own rule.
    """

    code = "SL203"
    title = "pattern matches no parameter"

    @classmethod
    def find(cls, view: SetupView) -> Iterator[Fault]:
        """One fault for each pattern."""
        known = [name for name, _ in view.model.named_parameters(remove_duplicate=False)]
        for path, patterns in view.ownership.unmatched.items():
            for pattern in patterns:
                yield cls.fault(
                    f"pattern `{pattern}` matches none of {counted(len(known), 'parameter name')}"
                    + (suggestion(pattern, known) or suggestion(pattern.rstrip(".*"), _prefixes(known))),
                    where=f"`{path}`",
                    why="patterns are compared with full parameter names, such as " + listed(known, 3) if known else "",
                    fix=f"correct `{pattern}` in `{path}`, or take it out",
                    names=(pattern,),
                )


def _prefixes(names: list[str]) -> list[str]:
    return list(
        dict.fromkeys(".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 1))
    )
