"""All rules over one run, what they found in order, and the numbers that they looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from safeloop.doctor import evaluation, gradients, loss, recorded, terms, updates
from safeloop.doctor.finding import LEVELS, Finding
from safeloop.doctor.modules import modules
from safeloop.doctor.run import Run
from safeloop.doctor.series import Series, short, span

_RULES: tuple[Callable[[Run], Iterator[Finding]], ...] = (
    loss.not_finite,
    recorded.faults,
    loss.trend,
    updates.rate_of_zero,
    updates.skipped,
    updates.loss_scale,
    modules,
    gradients.norms,
    gradients.clipping,
    gradients.spikes,
    evaluation.best_long_ago,
    evaluation.gap,
    terms.inactive,
    terms.negligible,
    terms.conflicts,
    recorded.speed,
    recorded.ending,
)
_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What looks wrong in a run, most serious first, and what was looked at."""

    path: str
    findings: tuple[Finding, ...]
    looked_at: tuple[str, ...]

    @property
    def is_serious(self) -> bool:
        """Whether something serious was found."""
        return any(finding.level == "serious" for finding in self.findings)

    @property
    def is_healthy(self) -> bool:
        """Whether nothing looks wrong; notes are no faults."""
        return all(finding.level == "note" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        findings = [{key: value for key, value in asdict(one).items() if key != "rank"} for one in self.findings]
        verdict = "serious" if self.is_serious else "healthy" if self.is_healthy else "suspicious"
        return {"run": self.path, "verdict": verdict, "findings": findings, "looked_at": list(self.looked_at)}

    def __str__(self) -> str:
        parts = [self._verdict(), *(_shown(index, one) for index, one in enumerate(self.findings, 1))]
        parts.append("looked at\n" + "\n".join(f"  {line}" for line in self.looked_at))
        return "\n\n".join(parts)

    def _verdict(self) -> str:
        if self.is_healthy:
            return f"{self.path}: nothing looks wrong"
        counts = [(level, sum(one.level == level for one in self.findings)) for level in LEVELS]
        return f"{self.path}: " + ", ".join(_counted(level, count) for level, count in counts if count)


def diagnose(run: Run) -> Diagnosis:
    """Apply every rule. Cost: linear in the log, about 0.1 s for 10,000 records of 50 tags."""
    found = [finding for rule in _RULES for finding in rule(run)]
    found.sort(key=lambda one: (LEVELS.index(one.level), -one.rank))
    return Diagnosis(str(run.path), tuple(found), tuple(_looked_at(run)))


def _counted(level: str, count: int) -> str:
    return f"{count} {level}" if level == "serious" or count == 1 else f"{count} {level}s"


def _shown(index: int, one: Finding) -> str:
    rows = {"what": one.what, "why": one.why, "fix": one.fix, "config": one.config}
    return "\n".join(
        [f"{index}. {one.level}: {one.title}", *(f"   {key:<6}  {text}" for key, text in rows.items() if text)]
    )


def _looked_at(run: Run) -> Iterator[str]:
    yield f"records  {len(run.steps)}, {span(run.steps)}"
    shown = ["loss/train", "loss/eval", *(f"metric/{name}" for name in run.under("metric/"))]
    shown += [f"grad/{owner}/{kind}" for owner in run.owners for kind in ("pre_clip", "clip_fraction")]
    shown += [f"optim/lr/{name}" for name in run.under("optim/lr/")]
    shown += ["perf/samples_per_s", "safety/skipped_total"]
    present = [tag for tag in shown if run.get(tag)]
    for tag in present[:_SHOWN]:
        yield f"{tag}  {_course(run.get(tag).finite)}"
    modules_seen = run.under("module/grad_norm/")
    if modules_seen:
        yield f"module/grad_norm  {len(modules_seen)} modules"
    yield f"faults  {len(run.faults)}"


def _course(series: Series) -> str:
    if not series:
        return "never finite"
    return (
        f"{short(series.values[0])} (step {series.steps[0]}) to {short(series.values[-1])} (step {series.steps[-1]}), "
        f"smallest {short(min(series.values))}, largest {short(max(series.values))}"
    )
