"""Optimizers that compute the loss several times in one update."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch.optim import LBFGS

from safeloop.checks.check import Check, EventCheck
from safeloop.checks.events import Backward, Event, GradientUse, Iteration, LoopState, Update
from safeloop.checks.source import at
from safeloop.faults import Fault


class ClosureRefused(Check):
    """An optimizer that needs a closure stands where it cannot work.

    ## What it does
    LBFGS evaluates the loss several times in one update, and the loop owns that closure. Refused before the first step:
    LBFGS in a phase with another optimizer, in a phase that repeats, with gradient clipping, or with fp16.

    ## Why it is bad
    Every evaluation must see the same function. Another optimizer would move weights in between, clipping and the fp16
    scale would falsify the gradients from which the curvature is estimated.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    optimizers = {"type": "LBFGS", "lr": 1.0, "max_norm": 1.0}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=optimizers, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    optimizers = {"type": "LBFGS", "lr": 1.0, "line_search_fn": "strong_wolfe"}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=optimizers, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Give LBFGS a phase of its own that does not repeat, in fp32 or bf16, without clipping.

    ## Source
    Documentation of `torch.optim.LBFGS`; https://github.com/Lightning-AI/pytorch-lightning/issues/4083.
    """

    code = "SL610"
    title = "optimizer with a closure cannot work here"


class ObjectiveNotFixed(Check):
    """LBFGS minimises a loss that changes from one evaluation to the next.

    ## What it does
    Looks for dropout and batch normalisation in training mode in a model that LBFGS trains.

    ## Why it is bad
    Each evaluation of one update draws another mask, or moves the running statistics: the line search compares values
    of different functions, and the curvature estimate is noise.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    Run(model=model, data=[torch.randn(8, 4)], optimizers={"type": "LBFGS"}, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    Run(model=model, data=[torch.randn(8, 4)], optimizers={"type": "LBFGS"}, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Take the layer out, put it into eval mode, or train with another optimizer.

    ## Source
    safeloop's own rule; measured: strong Wolfe with fresh masks ends at another loss than with fixed ones.
    """

    code = "SL611"
    title = "LBFGS on a loss that is not fixed"
    severity = "warning"


class TokensWithoutCount(Check):
    """Micro-batches are to be weighted by tokens, and nothing says how many tokens a micro-batch has.

    ## What it does
    With `accumulate.weight_by: tokens`, looks for a `count_tokens` of the Trainer, before the first step.

    ## Why it is bad
    Means over micro-batches with different numbers of tokens are not the mean over all tokens: gradients were 31 %
    wrong in a measured case.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    accumulate = {"micro_batches": 2, "weight_by": "tokens"}
    sgd = {"type": "SGD", "lr": 0.1}
    data = [torch.randn(8, 4), torch.randn(2, 4)]
    Run(model=nn.Linear(4, 1), data=data, optimizers=sgd, accumulate=accumulate, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

        def count_tokens(self, batch):
            return batch.numel()

    accumulate = {"micro_batches": 2, "weight_by": "tokens"}
    sgd = {"type": "SGD", "lr": 0.1}
    data = [torch.randn(8, 4), torch.randn(2, 4)]
    Run(model=nn.Linear(4, 1), data=data, optimizers=sgd, accumulate=accumulate, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Override `count_tokens(self, batch)` to return the number of tokens that the loss averages over, or weight by
    samples.

    ## Source
    https://github.com/huggingface/transformers/pull/34191.
    """

    code = "SL612"
    title = "tokens without a count"


class ClosureComputesNothing(EventCheck):
    """The closure of LBFGS runs no backward pass: it returns a loss that was computed before.

    ## What it does
    Looks whether anything writes gradients while the step of an LBFGS with a closure runs: a backward pass, or a line
    of the loop. Speaks at the second step without any, or when the watch ends after a single one. An LBFGS that looks
    at one point alone (`max_iter=1` without a line search), and other optimizers, need no new gradient.

    ## Why it is bad
    LBFGS moves the weights and calls the closure again, to see the loss and the gradient there. One that returns what
    was computed before shows it a function that is flat: the line search finds nothing, or every inner iteration
    repeats the same gradient.

    ## Bad
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe")
    x, y = torch.randn(16, 4), torch.randn(16, 1)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step(lambda: loss)
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe")
    x, y = torch.randn(16, 4), torch.randn(16, 1)

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(3):
            optimizer.step(closure)
            audit.step()
    ```
    ## Fix
    Let the closure zero the gradients, compute the loss anew, call backward() and return the loss.

    ## Source
    Documentation of `Optimizer.step(closure)` and of `torch.optim.LBFGS`.
    """

    code = "SL672"
    title = "closure computes nothing"

    def __init__(self) -> None:
        self._open: Update | None = None
        """the step that runs, or was the last thing that happened"""
        self._empty: Counter[str] = Counter()
        self._steps: Counter[str] = Counter()
        self._last: dict[str, Update] = {}

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the next step, or the end of the iteration, after a second closure without a backward pass."""
        if self._open is not None and state.inside == self._open.owner:
            if isinstance(event, Backward) or (isinstance(event, GradientUse) and event.is_write):
                self._open = None
        elif self._open is not None and isinstance(event, (Update, Iteration)):
            yield from self._over(self._open)
        if isinstance(event, Update) and event.has_closure and event.is_deep:
            self._steps[event.owner] += 1
            self._open = event if _evaluates_again(state.optimizers[event.owner]) else None

    def close(self, state: LoopState) -> Iterator[Fault]:
        """Where the watch ends after one step, with such a closure."""
        if self._open is not None:
            yield from self._over(self._open)
        for owner, last in self._last.items():
            if self._empty[owner] == self._steps[owner] == 1:
                yield self._fault_of(last)

    def _over(self, step: Update) -> Iterator[Fault]:
        self._open = None
        self._last[step.owner] = step
        self._empty[step.owner] += 1
        if self._empty[step.owner] == 2:
            yield self._fault_of(step)

    def _fault_of(self, step: Update) -> Fault:
        return self.fault(
            f"the closure of `{step.owner}` (LBFGS) runs no backward pass: it returns a loss that was computed before",
            where=at(step.site, f"step of `{step.owner}`"),
            why="LBFGS calls the closure at each point that it tries, for the loss and the gradient there; it is shown "
            "the same ones everywhere, so it stops where it is or steps blindly",
            fix="compute in the closure: `optimizer.zero_grad(); loss = ...; loss.backward(); return loss`",
            names=(step.owner,),
        )


def _evaluates_again(optimizer: Any) -> bool:
    """Whether an optimizer needs the loss at more points than the one where the gradients are already."""
    if not isinstance(optimizer, LBFGS):
        return False
    group = optimizer.param_groups[0]
    return bool(group.get("line_search_fn")) or min(group.get("max_iter", 2), group.get("max_eval") or 2) > 1
