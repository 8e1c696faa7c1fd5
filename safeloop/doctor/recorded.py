"""What the run itself recorded: faults, its speed, and how it ended."""

from __future__ import annotations

from collections.abc import Iterator

from safeloop.doctor.finding import Finding
from safeloop.doctor.run import Run
from safeloop.doctor.series import short

_ENOUGH = 10
_SLOWER = 0.5
_NOTICED_MS = 100.0


def faults(run: Run) -> Iterator[Finding]:
    """Every fault, errors first."""
    for fault in run.faults:
        times = "" if fault.count == 1 else f", {fault.count} times"
        is_error = fault.severity != "warning"
        yield Finding(
            "serious" if is_error else "warning",
            f"{fault.code} {fault.title}",
            f"{fault.what} (step {fault.step}{times})" + (f"; {fault.where}" if fault.where else ""),
            fault.why,
            fault.fix,
            f"safeloop explain {fault.code}",
            95 if is_error else 55,
        )


def speed(run: Run) -> Iterator[Finding]:
    """A run that gets slower from quarter to quarter, by half or more; not where a record takes less than 0.1 s."""
    series, pace = run.get("perf/samples_per_s").finite, run.get("perf/step_ms").finite
    if len(series) < _ENOUGH or len(pace) < 2 or (pace.steps[-1] - pace.steps[-2]) * pace.tail.median < _NOTICED_MS:
        return
    quarters = [series.part(index, 4) for index in range(4)]
    medians = [quarter.median for quarter in quarters]
    if medians == sorted(medians, reverse=True) and 0 <= medians[-1] < _SLOWER * medians[0]:
        yield Finding(
            "warning",
            "the run gets slower",
            f"perf/samples_per_s: {short(medians[0])} ({quarters[0].span}), {short(medians[-1])} "
            f"({quarters[-1].span}), less in each quarter",
            "something grows with each step (a list of losses that keeps graphs, a cache), the data gets slower, or "
            "the machine is shared",
            "look at the memory of the process; keep numbers (`.item()`) instead of tensors",
            "data.num_workers",
            25,
        )


def ending(run: Run) -> Iterator[Finding]:
    """A run without final weights: it is running, was killed, or ended in an error."""
    steps, wanted = run.steps, run.value("run", "max_steps")
    if not run.is_finished and steps:
        far = f"step {steps[-1]}" + (f" of {wanted}" if isinstance(wanted, int) else "")
        yield Finding(
            "note",
            "the run has no final weights",
            f"the last record is that of {far}"
            + (f"; {run.num_bad_lines} damaged lines were left out" if run.num_bad_lines else ""),
            "it is still running, or it was killed",
            "look again later, or see how the process ended",
        )
