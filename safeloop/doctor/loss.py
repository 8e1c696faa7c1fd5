"""Does the loss fall: not finite, diverged, risen again, or flat."""

from __future__ import annotations

import math
from collections.abc import Iterator

from safeloop.doctor.finding import Finding
from safeloop.doctor.run import Run
from safeloop.doctor.series import Series, short

_ENOUGH = 10
"""records below which a trend says nothing"""
_DIVERGED = 2.0
_EXPLODED = 100.0
_FLAT = 0.05
_NOTHING = 0.005
_CERTAIN = 3.0
"""standard errors"""


def not_finite(run: Run) -> Iterator[Finding]:
    """A loss or a loss term that was NaN or infinite."""
    for tag, series in run.series.items():
        if not tag.startswith("loss/"):
            continue
        bad = series.where([not math.isfinite(value) for value in series.values])
        if bad and not (tag == "loss/train" and _is_told_by_a_term(run, bad)):
            is_at_the_end = bad.steps[-1] == series.steps[-1]
            yield Finding(
                "serious" if is_at_the_end or len(bad) >= 3 else "warning",
                "the loss is not finite",
                f"{tag} is {bad.values[0]} in {len(bad)} of {len(series)} records, {bad.span}"
                + ("" if is_at_the_end else "; finite again afterwards"),
                "the learning rate is too large, an operation overflows (fp16), or a function is used outside of its "
                "domain (log of 0, division by 0)",
                "see SL405 and SL501 (`safeloop explain SL501`); lower the learning rate, run in fp32 once",
                _rate(run),
                100,
            )


def trend(run: Run) -> Iterator[Finding]:
    """At most one of: diverged, risen again, does not fall."""
    series = run.get("loss/train").finite
    if len(series) < _ENOUGH:
        return
    head, tail = series.head.median, series.tail.median
    smooth = series.smoothed()
    low = min(range(len(smooth)), key=lambda index: smooth.values[index])
    lowest = smooth.values[low]
    if _is_adversarial(run) or min(series.values) < 0:
        if abs(tail) > _EXPLODED**2 * max(1e-12, *map(abs, series.head.values)):
            yield _diverged(run, series)
    elif tail > _DIVERGED * head and tail - head > _CERTAIN * series.noise:
        yield _diverged(run, series)
    elif tail - lowest > 0.5 * (head - lowest) and head > 1.2 * lowest and tail - lowest > _CERTAIN * series.noise:
        yield _risen(run, series, lowest, smooth.steps[low])
    elif max(series.values) > max(_EXPLODED * tail, 3 * series.values[0]):
        yield _exploded(run, series)
    elif _is_flat(series):
        yield _flat(run, series)


def _diverged(run: Run, series: Series) -> Finding:
    head, tail = series.head, series.tail
    return Finding(
        "serious",
        "the loss diverges",
        f"loss/train rose from {short(head.median)} ({head.span}) to {short(tail.median)} ({tail.span})",
        "the learning rate is too large, or the sign of a loss term is wrong",
        "lower the learning rate 10 times, warm it up, or clip (`max_norm`)",
        _rate(run),
        90,
    )


def _risen(run: Run, series: Series, lowest: float, step: int) -> Finding:
    head, tail = series.head, series.tail
    is_back = tail.median >= 0.9 * head.median
    return Finding(
        "serious" if is_back else "warning",
        "the loss rose again",
        f"loss/train: {short(head.median)} ({head.span}), lowest {short(lowest)} (about step {step}), "
        f"{short(tail.median)} ({tail.span})",
        "training got unstable: the learning rate is too large at that point, or the data changed",
        "lower the learning rate, clip (`max_norm`), or let a scheduler bring it down before that step",
        _rate(run),
        80,
    )


def _exploded(run: Run, series: Series) -> Finding:
    peak = max(range(len(series)), key=lambda index: series.values[index])
    late = series.second_half
    is_stuck = len(late) >= _ENOUGH // 2 and _is_flat(late)
    return Finding(
        "serious" if is_stuck else "warning",
        "the loss exploded on the way",
        f"loss/train: {short(series.values[0])} (step {series.steps[0]}), {short(series.values[peak])} (step "
        f"{series.steps[peak]}), {short(series.tail.median)} ({series.tail.span})"
        + (f"; flat since step {late.steps[0]}" if is_stuck else ""),
        "the first updates were far too large; what is left afterwards is often a constant answer of dead units",
        "lower the learning rate 10 times or more, warm it up, or clip (`max_norm`)",
        _rate(run),
        88,
    )


def _is_flat(series: Series) -> bool:
    """Whether the change is small, and either lost in the noise or next to nothing."""
    head, change = series.head.median, abs(series.head.median - series.tail.median)
    return head > 0 and (change <= _NOTHING * head or (change <= _FLAT * head and change <= _CERTAIN * _error(series)))


def _flat(run: Run, series: Series) -> Finding:
    head, tail = series.head, series.tail
    is_long = len(series) >= 2 * _ENOUGH
    return Finding(
        "serious" if is_long else "warning",
        "the loss does not fall",
        f"loss/train: {short(head.median)} ({head.span}), {short(tail.median)} ({tail.span}), {len(series)} records; "
        f"neighbours differ by {short(series.noise)}",
        "the learning rate is too large (units die, the loss stays at that of a constant answer) or far too small, or "
        "the loss does not depend on what is trained; or the run began where it could not get better",
        "try 10 times less and 10 times more; see the gradients below",
        _rate(run),
        60,
    )


def _error(series: Series) -> float:
    """Standard error of the difference of two medians of `head` records each."""
    return 1.2533 * math.sqrt(2 / len(series.head)) * max(series.noise, 1e-12 * abs(series.median))


def _is_adversarial(run: Run) -> bool:
    """Whether several optimizers play against each other, so that no loss has to fall."""
    return len(run.owners) > 1


def _is_told_by_a_term(run: Run, bad: Series) -> bool:
    """Whether a loss term, which says more, is not finite at these steps too."""
    for name, term in run.under("loss/").items():
        found = {step for step, value in zip(term.steps, term.values, strict=True) if not math.isfinite(value)}
        if name not in ("train", "eval") and found.issuperset(bad.steps):
            return True
    return False


def _rate(run: Run) -> str:
    return ", ".join(run.setting("optimizers", owner, "lr") for owner in run.owners) or "optimizers.NAME.lr"
