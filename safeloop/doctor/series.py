"""A number over the steps of a run, and what the rules ask of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Series:
    """One tag: its steps, rising, and its values, which may be NaN or infinite."""

    tag: str
    steps: tuple[int, ...]
    values: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.values)

    @property
    def finite(self) -> Series:
        """Without the values that are not finite."""
        kept = [index for index, value in enumerate(self.values) if math.isfinite(value)]
        return self._of(kept)

    @property
    def second_half(self) -> Series:
        """The later half of the records."""
        return self._of(range(len(self) // 2, len(self)))

    def part(self, index: int, number: int) -> Series:
        """One of `number` parts of equal length."""
        return self._of(range(index * len(self) // number, (index + 1) * len(self) // number))

    @property
    def head(self) -> Series:
        """The first tenth of the records, three at least."""
        return self._of(range(min(len(self), max(3, len(self) // 10))))

    @property
    def tail(self) -> Series:
        """The last tenth of the records, three at least."""
        return self._of(range(max(0, len(self) - max(3, len(self) // 10)), len(self)))

    @property
    def median(self) -> float:
        """The middle value; NaN where there is none."""
        return statistics.median(self.values) if self.values else math.nan

    @property
    def noise(self) -> float:
        """How much neighbours differ: the standard deviation that normal noise of that size would have."""
        if len(self) < 2:
            return 0.0
        jumps = [abs(b - a) for a, b in zip(self.values, self.values[1:], strict=False)]
        return statistics.median(jumps) / (0.6745 * math.sqrt(2))

    @property
    def span(self) -> str:
        """`step 10`, `steps 10 to 40`."""
        return span(self.steps)

    def smoothed(self, width: int = 5) -> Series:
        """Each value replaced by the median of the `width` records around it."""
        half = width // 2
        values = [statistics.median(self.values[max(0, i - half) : i + half + 1]) for i in range(len(self))]
        return Series(self.tag, self.steps, tuple(values))

    def where(self, keep: Sequence[bool]) -> Series:
        """The records for which `keep` is true."""
        return self._of([index for index, kept in enumerate(keep) if kept])

    def _of(self, indices: Sequence[int]) -> Series:
        steps, values = tuple(self.steps[i] for i in indices), tuple(self.values[i] for i in indices)
        return Series(self.tag, steps, values)


def span(steps: Sequence[int]) -> str:
    """`step 10`, `steps 10 to 40`."""
    if not steps:
        return "no step"
    return f"step {steps[0]}" if steps[0] == steps[-1] else f"steps {steps[0]} to {steps[-1]}"


def ratio(a: float, b: float) -> float:
    """`a / b` of two numbers that are not negative; infinite where only `b` is 0, 1 where both are."""
    if b == 0:
        return 1.0 if a == 0 else math.inf
    return a / b


def short(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}"
