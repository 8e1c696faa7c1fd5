"""Gradients that are next to nothing, or astronomically large."""

from __future__ import annotations

from collections.abc import Iterator

from safeloop.checks.check import Check
from safeloop.checks.gradients.history import History, Trace
from safeloop.checks.wording import listed
from safeloop.faults import Fault

HUGE = 1e10
TINY = 1e-12
FAINT, STILL = 1e-9, 1e-8
"""Of the largest gradient, and at all: below the second one even Adam, whose eps it is, hardly moves a weight."""
_MANY = 4
"""So many weights with faint gradients, and more than half of all, are a network that lets nothing through."""


class VanishingGradient(Check):
    """The gradients of some layers are vanishingly small beside those of others.

    ## What it does
    Tells weights whose gradient was below 1e-12 of the largest one on all of at least 5 steps that were looked at, and
    not zero. Below 1e-9 is enough for at least 4 weights that are more than half of all, with norms below 1e-8: single
    ones may be the branches of a layer scale or of an adapter. Cost: a norm for each gradient.

    ## Why it is bad
    Each layer multiplies the gradient by its derivative. What reaches the first layers is rounding noise, so that they
    stay as they were initialised; an optimizer such as Adam even scales that noise up.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    sgd = {"type": "SGD", "lr": 0.1}
    model = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()) for _ in range(30)])
    Run(model=model, data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 6}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    sgd = {"type": "SGD", "lr": 0.1}
    model = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU()) for _ in range(30)])
    Run(model=model, data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 6}).fit()
    ```
    ## Fix
    Use ReLU-like activations, residual connections or normalisation, initialise for them (He, Glorot, orthogonal), or
    use gated cells in place of a plain recurrence.

    ## Source
    Hochreiter, "Untersuchungen zu dynamischen neuronalen Netzen", 1991; Glorot and Bengio, "Understanding the
    difficulty of training deep feedforward neural networks", 2010.
    """

    code = "SL504"
    title = "vanishing gradient"
    severity = "warning"

    @classmethod
    def find(cls, view: History) -> Iterator[Fault]:
        """Where the norm of a weight's gradient was below 1e-12 of the largest on every step, or of half below 1e-9."""
        weights = {n: t for n, t in view.traces.items() if t.steps >= 5 and view.dimensions.get(n, 0) > 1}
        tiny = [name for name, trace in weights.items() if trace.tiny == trace.steps]
        underflown = [n for n, t in weights.items() if t.cause is None and t.zero and t.tiny + t.zero == t.steps]
        faint = [name for name, trace in weights.items() if trace.faint == trace.steps]
        is_most = len(faint) >= _MANY and 2 * len(faint) > len(weights)
        found = {*tiny, *underflown, *(faint if is_most else ())} if tiny or is_most else ()
        if found:
            names, share = [name for name in weights if name in found], FAINT if is_most else TINY
            trace = max((view.traces[name] for name in (faint if is_most else tiny[-1:])), key=lambda t: t.largest)
            yield cls.fault(
                f"the gradients of {listed(names)} have norms of at most {trace.largest:.2g}, below {share:g} of the "
                f"largest, on all of {trace.steps} steps",
                where=view.where,
                why="each layer multiplies the gradient by its derivative: many sigmoids or tanhs, or small weights, "
                "leave nothing for the first layers",
                fix="use ReLU-like activations, residual connections or normalisation, and initialise for them",
                names=names,
            )


class ExplodingGradient(Check):
    """The gradients of some parameters are astronomically large.

    ## What it does
    Tells parameters whose gradient had a finite norm above 1e10 on a step that was looked at. Infinite ones are SL501.
    Cost: a norm for each gradient.

    ## Why it is bad
    One step with it throws the weights far away, where every unit is saturated; the next loss is often NaN.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            for _ in range(12):
                batch = self.model(batch)
            return batch.mean()

    adam = {"type": "Adam", "lr": 0.1}
    model = nn.Linear(4, 4)
    nn.init.constant_(model.weight, 2.0)
    Run(model=model, data=[torch.randn(8, 4)], optimizers=adam, run={"max_steps": 5}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            for _ in range(12):
                batch = self.model(batch).tanh()
            return batch.mean()

    adam = {"type": "Adam", "lr": 0.1}
    model = nn.Linear(4, 4)
    nn.init.constant_(model.weight, 0.2)
    Run(model=model, data=[torch.randn(8, 4)], optimizers=adam, run={"max_steps": 5}).fit()
    ```
    ## Fix
    Lower the gain that is repeated (a recurrent weight, layers without normalisation), take a mean in place of a sum,
    or clip (`max_norm`).

    ## Source
    Pascanu et al., "On the difficulty of training recurrent neural networks", 2013.
    """

    code = "SL505"
    title = "exploding gradient"
    severity = "warning"

    @classmethod
    def find(cls, view: History) -> Iterator[Fault]:
        """Where a finite norm was above 1e10."""
        names = sorted((n for n, t in view.traces.items() if _is_huge(t)), key=lambda n: -view.traces[n].largest)
        if names:
            yield cls.fault(
                f"the gradient of {listed(names)} has a norm of up to {view.traces[names[0]].largest:.3g}",
                where=view.where,
                why="a gain above 1 is repeated many times (a recurrent weight, layers without "
                "normalisation), or a loss "
                "is summed where a mean was meant",
                fix="lower the gain, normalise, or clip (`max_norm`); a step with it would destroy the weights",
                names=names,
            )


def _is_huge(trace: Trace) -> bool:
    return HUGE < trace.largest < float("inf")
