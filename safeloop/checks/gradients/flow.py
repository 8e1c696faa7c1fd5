"""Parameters that no gradient reaches, or only zeros, or next to nothing."""

from __future__ import annotations

from collections.abc import Iterator

from safeloop.checks.check import Check
from safeloop.checks.gradients.history import History, Trace
from safeloop.checks.source import at
from safeloop.checks.wording import listed
from safeloop.faults import Fault

HUGE = 1e10
TINY = 1e-12


class NoGradient(Check):
    """A parameter that is to be trained never gets a gradient.

    ## Source
    https://github.com/facebookresearch/fairchem/pull/317; https://github.com/lanlan96/ARM3D/issues/1.
    """

    code = "SL502"
    title = "parameter without gradient"

    @classmethod
    def find(cls, view: History) -> Iterator[Fault]:
        """One fault for all parameters with one cause."""
        groups: dict[tuple[str, str], list[str]] = {}
        for name, trace in view.traces.items():
            if trace.steps and trace.absent == trace.steps and name not in view.routed:
                cause = trace.cause
                key = ("", "") if cause is None else (cause.text, at(cause.site, ""))
                groups.setdefault(key, []).append(name)
        for (text, place), names in groups.items():
            trace = view.traces[names[0]]
            cause = trace.cause
            yield cls.fault(
                f"{listed(names)} got no gradient on any of {trace.steps} steps",
                where=place or view.where,
                why=text or "no loss depends on them, or every path to them is cut",
                fix=_FIXES["unused" if cause is None else cause.kind],
                names=names,
            )


_FIXES = {
    "cut": "keep the path in differentiable torch functions with grad mode on; freeze them by `requires_grad_(False)` "
    "where they are not to be trained",
    "escape": "use their result in a loss, without leaving torch; freeze them by `requires_grad_(False)` where they are "
    "not to be trained",
    "unused": "use them in the forward, remove them, or freeze them by `requires_grad_(False)`",
}


class AlwaysZero(Check):
    """A parameter's gradient is exactly zero on every step.

    ## Source
    Wardat et al., "DeepDiagnosis", 2022 (https://ar5iv.labs.arxiv.org/html/2112.04036): dying ReLU.
    """

    code = "SL503"
    title = "gradient always zero"
    severity = "warning"

    @classmethod
    def find(cls, view: History) -> Iterator[Fault]:
        """One fault for all parameters with one cause."""
        groups: dict[tuple[str, str], list[str]] = {}
        for name, trace in view.traces.items():
            if trace.steps and trace.zero and trace.zero + trace.absent == trace.steps and trace.zero >= 5:
                cause = trace.cause
                key = ("", "") if cause is None else (cause.text, at(cause.site, ""))
                groups.setdefault(key, []).append(name)
        for (text, place), names in groups.items():
            trace = view.traces[names[0]]
            yield cls.fault(
                f"the gradient of {listed(names)} was exactly zero on all of {trace.zero} steps",
                where=place or view.where,
                why=text
                or "every path to them runs through something whose derivative is zero here: a dead ReLU, a saturated "
                "clamp, a rounding, a factor of zero",
                fix="look at the values that go into that operation: a bias far off, a scale, a weight of zero",
                names=names,
            )


class VanishingGradient(Check):
    """The gradients of some layers are vanishingly small beside those of others.

    ## Source
    Hochreiter, "Untersuchungen zu dynamischen neuronalen Netzen", 1991; Glorot and Bengio, "Understanding the
    difficulty of training deep feedforward neural networks", 2010.
    """

    code = "SL504"
    title = "vanishing gradient"
    severity = "warning"

    @classmethod
    def find(cls, view: History) -> Iterator[Fault]:
        """Where the norm of a weight's gradient was below 1e-12 of the largest on every step."""
        names = [
            name
            for name, trace in view.traces.items()
            if trace.tiny == trace.steps and trace.steps >= 5 and view.dimensions.get(name, 0) > 1
        ]
        if names:
            trace = view.traces[names[0]]
            yield cls.fault(
                f"the gradients of {listed(names)} have norms of at most {trace.largest:.2g}, below {TINY:g} of the "
                f"largest, on all of {trace.steps} steps",
                where=view.where,
                why="each layer multiplies the gradient by its derivative: many sigmoids or tanhs, or small weights, "
                "leave nothing for the first layers",
                fix="use ReLU-like activations, residual connections or normalisation, and initialise for them",
                names=names,
            )


class ExplodingGradient(Check):
    """The gradients of some parameters are astronomically large.

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
                why="a gain above 1 is repeated many times (a recurrent weight, layers without normalisation), or a loss "
                "is summed where a mean was meant",
                fix="lower the gain, normalise, or clip (`max_norm`); a step with it would destroy the weights",
                names=names,
            )


def _is_huge(trace: Trace) -> bool:
    return HUGE < trace.largest < float("inf")


class TermAlwaysZero(Check):
    """A loss term is exactly zero on every step, although it depends on the model.

    ## Source
    Seen as a loss weight that an integer division made zero.
    """

    code = "SL424"
    title = "loss term always zero"
    severity = "warning"

    @classmethod
    def find(cls, view: History) -> Iterator[Fault]:
        """Terms that were zero on every step that was looked at."""
        for term, steps in view.terms_zero.items():
            if steps >= 5:
                yield cls.fault(
                    f"loss term `{term}` was exactly 0 on all of {steps} steps, and has a graph",
                    where=view.term_sites.get(term, view.where),
                    why="it is multiplied by zero (an integer division such as `1 // 4`, a weight that was never set), or "
                    "clamped there: what only it trains gets zero gradients",
                    fix="correct its weight, or take the term out; where it is zero until later, give it a weight that "
                    "moves (`losses.NAME.weight: {start, end, steps}`) or `every`",
                    names=(term,),
                )
