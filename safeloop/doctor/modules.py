"""Gradient norms of the modules beside one another."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from safeloop.checks.wording import listed
from safeloop.doctor.finding import Finding
from safeloop.doctor.run import Run
from safeloop.doctor.series import Series, short

_ENOUGH = 3
_FAR_BELOW = 1e-6
_SHOWN = 6


def modules(run: Run) -> Iterator[Finding]:
    """Modules whose gradient is exactly zero, or orders of magnitude below that of the others, in the later half."""
    found = {name: series.finite for name, series in run.under("module/grad_norm/").items()}
    found = {name: series for name, series in found.items() if len(series) >= _ENOUGH}
    zero = {name: series for name, series in found.items() if max(series.second_half.values) == 0}
    alive = {name: series.second_half.median for name, series in found.items() if name not in zero}
    if zero and alive:
        yield _zero(run, zero, len(found))
    if len(alive) >= 2:
        usual = statistics.median(alive.values())
        below = {name: norm for name, norm in alive.items() if norm <= _FAR_BELOW * usual}
        if below and usual > 0:
            names = ", ".join(f"`{name}` {short(norm)}" for name, norm in list(below.items())[:_SHOWN])
            yield Finding(
                "warning",
                "modules far below the others",
                f"median gradient norm over the later half: {names}; of all modules {short(usual)}",
                "the gradient vanishes on its way through saturated or badly scaled layers",
                "use residual connections or normalisation, another activation, and a matching initialisation",
                "module/grad_norm/* in the log",
                40,
            )


def _zero(run: Run, zero: dict[str, Series], number: int) -> Finding:
    since = max(_zero_since(series) for series in zero.values())
    always = since <= min(series.steps[0] for series in zero.values())
    names = listed(zero)
    return Finding(
        "serious",
        "modules without a gradient",
        f"{len(zero)} of {number} modules have gradient norm exactly 0 "
        + ("in every record" if always else f"from step {since} on")
        + f": {names}",
        "a cut graph gives no gradient at all; zeros come from dead or saturated units, or from a loss that is "
        "constant in these modules",
        "lower the learning rate where they died on the way; else look at what lies between them and the loss "
        "(`safeloop train ... audit.level=full`)",
        ", ".join(run.setting("optimizers", owner, "lr") for owner in run.owners),
        75,
    )


def _zero_since(series: Series) -> int:
    last = max((index for index, value in enumerate(series.values) if value), default=-1)
    return series.steps[last + 1]
