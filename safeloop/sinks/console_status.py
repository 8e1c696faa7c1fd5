"""What both consoles show: the latest readings of a run, put into words."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta

from safeloop.faults import Fault, printable
from safeloop.sinks.record import DROPPED, Record, RunInfo
from safeloop.sinks.tensorboard import dashboard_text

_SHOWN_IN_FULL = 3


class Status:
    """The latest readings and the faults of a run. `arrow` and `times` are signs that the output can print."""

    def __init__(self, run: RunInfo, *, arrow: str = "->", times: str = "x") -> None:
        self.run = run
        self.arrow = arrow
        self.name = printable(run.name)
        self.step = 0
        self.epoch = 0
        self.latest: dict[str, float] = {}
        self._times = times
        self._began = time.monotonic()
        self._first: tuple[int, float] | None = None
        self._faults: dict[Fault, int] = {}
        self._held: list[tuple[Fault, int]] = []

    def take(self, record: Record) -> None:
        """Remember a record."""
        self.epoch = record.epoch
        self.reach(record.step, record.scalars)

    def reach(self, step: int, scalars: Mapping[str, float]) -> None:
        """Remember that a step is done, and its readings, if any."""
        if self._first is None:
            self._first = (step, time.monotonic())
        self.step = step
        if scalars:
            self.latest.update(scalars)

    def take_fault(self, fault: Fault, step: int, count: int) -> None:
        """Count a fault; a new one waits for `news`."""
        if fault not in self._faults:
            self._held.append((fault, step))
        self._faults[fault] = count

    def news(self, *, with_errors: bool) -> Iterator[tuple[Fault, str]]:
        """New faults and what to print of them: in full, one line after three of the same code.

        An error waits until the run is seen to go on after it (`with_errors`): the one that ends the run is raised, and
        who catches it prints it.
        """
        due = [(fault, step) for fault, step in self._held if with_errors or fault.severity == "warning"]
        self._held = [item for item in self._held if item not in due]
        for fault, step in due:
            same = [other for other in self._faults if other.code == fault.code]
            is_short = same.index(fault) >= _SHOWN_IN_FULL
            yield (
                fault,
                f"{fault.code} {fault.title} at step {step}: {printable(fault.what)}" if is_short else str(fault),
            )

    def tally(self) -> str:
        """`SL501 non-finite gradient x17, SL854 ...`; empty without faults."""
        counts: Counter[str] = Counter()
        for fault, count in self._faults.items():
            counts[f"{fault.code} {fault.title}"] += count
        return ", ".join(f"{name} {self._times}{n:,}" if n > 1 else name for name, n in counts.items())

    @property
    def fraction(self) -> float | None:
        """How much of the run is done, 0 to 1; None where its length is unknown."""
        return min(1.0, self.step / self.run.max_steps) if self.run.max_steps else None

    def left(self) -> str:
        """`0:21 left`, from the speed since the first step; empty while unknown."""
        first, now = self._first or (self.step, 0.0), time.monotonic()
        if not self.run.max_steps or not first[0] < self.step < self.run.max_steps:
            return ""
        return f"{duration((now - first[1]) / (self.step - first[0]) * (self.run.max_steps - self.step))} left"

    def result(self, outcome: str) -> list[tuple[str, str]]:
        """The rows of the result block; the first is the heading. Nothing for a sink that is dropped."""
        if outcome == DROPPED:
            return []
        took = f"{self.step:,} steps in {duration(time.monotonic() - self._began)}"
        rows = [(f"{self.name} {printable(outcome)}", "   ".join(filter(None, (took, speed(self.latest)))))]
        rows += losses(self.latest)
        for name, norm, _ in optimizers(self.latest, self.run.owners, self.arrow):
            rows += [(f"grad {name}" if len(self.run.owners) > 1 else "grad", norm)] if norm else []
        rows += [("faults", self.tally() or "none"), ("run", printable(str(self.run.dir)))]
        if any(self.run.dir.glob("events.out.tfevents.*")):
            command, address = dashboard_text(self.run.dir).splitlines()
            rows += [("dashboard", printable(command)), ("", address)]
        return rows


def losses(scalars: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Label and value of the loss, the metrics and the loss terms, in this order; a single term is the loss itself."""
    names = {"loss/train": "loss", "loss/eval": "eval loss"}
    metrics = [tag for tag in scalars if tag.startswith("metric/")]
    terms = [tag for tag in scalars if tag.startswith("loss/") and tag not in names]
    if len(terms) == 1 and scalars[terms[0]] == scalars.get("loss/train"):
        terms = []
    for tag in dict.fromkeys([*names, *metrics, *terms]):
        if tag in scalars:
            yield printable(names.get(tag, tag.partition("/")[2])), number(scalars[tag])


def optimizers(scalars: Mapping[str, float], owners: Sequence[str], arrow: str) -> Iterator[tuple[str, str, str]]:
    """Name, gradient norm before and after clipping, and learning rate of each; what is unknown is empty."""
    for owner in owners:
        before, after = (scalars.get(f"grad/{owner}/{name}") for name in ("pre_clip", "post_clip"))
        if before is None and len(owners) == 1:
            before, after = (scalars.get(f"grad/total/{name}") for name in ("pre_clip", "post_clip"))
        texts = [number(value) for value in (before, after) if value is not None]
        lr = scalars.get(f"optim/lr/{owner}")
        yield printable(owner), f" {arrow} ".join(dict.fromkeys(texts)), "" if lr is None else f"{lr:.2e}"


def speed(scalars: Mapping[str, float]) -> str:
    """`9,120 samples/s`; empty while unknown."""
    rate = scalars.get("perf/samples_per_s", math.nan)
    return f"{rate:,.0f} samples/s" if math.isfinite(rate) else ""


def number(value: float) -> str:
    """Four significant digits: `0.08310`, `2.303`, `1,235`, `3.10e-05`, `nan`."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if 1e-3 <= abs(value) < 999.95:
        return f"{value:#.4g}"
    return f"{value:,.0f}" if 1 <= abs(value) < 1e6 else f"{value:.2e}"


def duration(seconds: float) -> str:
    """`0:07`, `12:30`, `3:05:00`, `2 days, 1:00:00`."""
    text = str(timedelta(seconds=round(seconds)))
    return text.removeprefix("0:0") if text.startswith("0:0") else text.removeprefix("0:")
