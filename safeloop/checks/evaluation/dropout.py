"""Functional dropout that does not follow the mode of its module."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from torch import nn

from safeloop.autograd.sites import call_text
from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck
from safeloop.checks.source import at
from safeloop.faults import Fault

DROPOUTS = frozenset(
    (
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"),
        "scaled_dot_product_attention",
    )
)
"""Functions that drop values at random."""


class DropoutInEvaluation(CallCheck):
    """Functional dropout is active in eval mode.

    ## What it does
    Looks at calls of `F.dropout` and its like, and of `scaled_dot_product_attention` with `dropout_p`, in the forward
    of a module that is in eval mode. A call that says `training=` is meant so (Monte Carlo dropout) and is not told.
    Cost: none beyond the tape of calls, which runs for the first two batches of `metrics`.

    ## Why it is bad
    A functional dropout does not know the mode of the module: its default is to be active. Every evaluation is random,
    and worse than the model is.

    ## Bad
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, x):
            return self.layer(F.dropout(x, 0.5))

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

        def metrics(self, batch):
            return {"error": self.model(batch).abs().mean()}

    sgd = {"type": "SGD", "lr": 0.1}
    data = [torch.randn(8, 4)]
    Run(model=Net(), data=data, eval_data=data, optimizers=sgd, run={"max_steps": 1}, evaluate={"every": 1}).fit()
    ```
    ## Good
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, x):
            return self.layer(F.dropout(x, 0.5, training=self.training))

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

        def metrics(self, batch):
            return {"error": self.model(batch).abs().mean()}

    sgd = {"type": "SGD", "lr": 0.1}
    data = [torch.randn(8, 4)]
    Run(model=Net(), data=data, eval_data=data, optimizers=sgd, run={"max_steps": 1}, evaluate={"every": 1}).fit()
    ```
    ## Fix
    Pass `training=self.training`, or use `nn.Dropout`. For attention pass `dropout_p=self.p if self.training else
    0.0`.

    ## Source
    https://github.com/pytorch/pytorch/issues/26338.
    """

    code = "SL704"
    title = "dropout active in evaluation"
    severity = "warning"
    hears = DROPOUTS

    def __init__(self) -> None:
        self._told: set[str] = set()

    def hear(self, call: Call) -> Iterator[Fault]:
        """Where a module in eval mode calls dropout without saying whether it trains."""
        module = call.tape.running
        if module is None or module.training or (not call.is_direct and call.name != "scaled_dot_product_attention"):
            return
        if not drops(call) or _is_said(call):
            return
        place = at(call.site, f"forward of `{call.tape.module}`")
        if place in self._told:
            return
        self._told.add(place)
        fix = (
            "dropout_p=self.p if self.training else 0.0" if call.name.startswith("scaled") else "training=self.training"
        )
        yield self.fault(
            f"`{call.name}` drops values although module `{call.tape.module}` is in eval mode",
            where=place,
            why="a functional dropout does not know the mode of the module: its default is to be active, so that every "
            "evaluation is random",
            fix=f"pass `{fix}`, or use nn.Dropout",
            names=(call.tape.module,),
        )


def drops(call: Call) -> bool:
    """Whether a call of one of `DROPOUTS` drops anything."""
    if call.name == "scaled_dot_product_attention":
        p = call.kwargs.get("dropout_p", call.args[4] if len(call.args) > 4 else 0.0)
        return bool(p) and not isinstance(call.tape.running, nn.MultiheadAttention)
    return bool(call.kwargs.get("training", True)) and bool(call.kwargs.get("p", 0.5))


def _is_said(call: Call) -> bool:
    """Whether the call says that it trains (Monte Carlo dropout), or cannot be read."""
    if call.name == "scaled_dot_product_attention":
        return False
    text = "" if call.frame is None else call_text(call.frame).strip()
    if not text or "training" in text or "train=" in text:
        return True
    try:
        parsed = ast.parse(text, mode="eval").body
    except SyntaxError:  # a line of a longer call
        return False
    return isinstance(parsed, ast.Call) and (len(parsed.args) > 2 or any(k.arg is None for k in parsed.keywords))
