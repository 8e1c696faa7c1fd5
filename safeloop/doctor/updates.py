"""Updates that did not happen: skipped, of rate zero, or at a collapsing loss scale."""

from __future__ import annotations

from collections.abc import Iterator

from safeloop.doctor.finding import Finding, Level
from safeloop.doctor.run import Run
from safeloop.doctor.series import short

_MANY = 0.1
_FEW = 0.01
_COLLAPSED = 1.0


def skipped(run: Run) -> Iterator[Finding]:
    """Steps that a non-finite gradient kept from their update."""
    series = run.get("safety/skipped_total").finite
    total = max(series.values, default=0.0)
    if total <= 0:
        return
    share = total / max(1, series.steps[-1])
    is_going_on = len(series) >= 3 and series.values[-1] > series.values[len(series) // 2]
    is_fp16 = run.value("run", "precision") == "fp16"
    level: Level = "serious" if share >= _MANY else "note" if is_fp16 and share <= _FEW else "warning"
    first = next(step for step, value in zip(series.steps, series.values, strict=True) if value > 0)
    yield Finding(
        level,
        "updates were skipped",
        f"{total:.0f} of {series.steps[-1]} steps ({share:.1%}), the first before step {first}"
        + ("; still going on" if is_going_on else ""),
        "their gradient was not finite"
        + (": the gradient scale of fp16 was too large, as it is now and then" if is_fp16 else ""),
        "set `nonfinite.policy: raise` once: the first one then ends in a fault that names loss term and parameter",
        run.setting("nonfinite", "policy"),
        80,
    )


def rate_of_zero(run: Run) -> Iterator[Finding]:
    """A learning rate that is zero while steps go on; the last step of a schedule may end there."""
    for name, series in run.under("optim/lr/").items():
        values = series.finite
        zeros = values.where([value == 0 for value in values.values])
        last = next((i for i in reversed(range(len(values))) if values.values[i] != 0), -1)
        stretch = len(values) - 1 - last
        owner = name.partition("/")[0]
        if not zeros or (last >= 0 and stretch < max(3, len(values) // 20)):
            continue
        since = values.steps[last + 1]
        yield Finding(
            "serious" if last >= 0 or "/" not in name else "note",
            f"the learning rate of `{name}` is zero",
            f"optim/lr/{name} is 0 from step {since} to {values.steps[-1]}: {stretch} of {len(values)} records",
            "the schedule has run out (its length is given in steps here, not in epochs), or multiplies by 0",
            "make the schedule as long as the run, or end it above 0",
            run.setting("optimizers", owner, "scheduler") + _length(run, owner),
            85,
        )


def loss_scale(run: Run) -> Iterator[Finding]:
    """The gradient scale of fp16, halved at each overflow, below 1."""
    for tag, series in run.series.items():
        if tag.rpartition("/")[2] in ("loss_scale", "grad_scale", "scale") and series.finite:
            first, last = series.finite.values[0], series.finite.values[-1]
            if last < _COLLAPSED <= first:
                yield Finding(
                    "serious",
                    "the gradient scale collapses",
                    f"{tag} fell from {short(first)} to {short(last)} (step {series.finite.steps[-1]})",
                    "step after step overflows: the gradients are not finite for another reason than their size",
                    "run in bf16 or fp32, and see which term is not finite",
                    run.setting("run", "precision"),
                    78,
                )


def _length(run: Run, owner: str) -> str:
    scheduler = run.value("optimizers", owner, "scheduler")
    kinds = scheduler if isinstance(scheduler, dict) else {}
    told = ", ".join(f"{key}: {value}" for key, value in kinds.items() if not isinstance(value, dict | list))
    return f" (now {told})" if told else ""
