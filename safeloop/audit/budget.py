"""When a step is looked at in depth: at first always, later as often as a share of the step time allows."""

from __future__ import annotations

import math
from typing import Literal

Level = Literal["off", "standard", "full"]

FIRST_STEPS = 20
"""At level `standard`, steps that are all looked at in depth; they lie outside the budget."""
LATE = 200
"""Steps after which what has had no gradient yet is not waited for any longer"""
STRIDE = 17
"""Plain steps from one whose time is taken to the next"""
_SMOOTH = 0.2
_LEAST_GAP = 50
_MOST_ASKED = 20
"""Deep steps that may be asked for in a run, beyond what the budget allows"""
_KNOWN = 10
"""Plain steps after which their time is known well enough"""


class Budget:
    """Chooses the steps of deep checks.

    Args:
        level: `off`: none; `standard`: the first 20, those that are asked for, and as many as `share` allows; `full`:
            all.
        share: the fraction of the time of a plain step that deep checks may cost, measured while running; None: all
            steps; 0: none after the first ones.
    """

    def __init__(self, level: Level, share: float | None = 0.01) -> None:
        self.level = "full" if level == "standard" and share is None else level
        self._share = share or 0.0
        self._plain = 0.0
        self._deep = 0.0
        self._num_plain = 0
        self._next: int | None = None
        self._is_asked = False
        self._num_asked = 0
        self._spent = 0.0

    def ask(self) -> None:
        """The next step is to be looked at: something has changed, or went wrong. The first 20 times of a run."""
        if not self._is_asked and self._num_asked < _MOST_ASKED:
            self._num_asked += 1
            self._is_asked = True

    def wants(self, step: int) -> bool:
        """Whether a step, counted from 0, is looked at in depth."""
        if self.level != "standard":
            return self.level == "full"
        return step < FIRST_STEPS or self._is_asked or (self._next is not None and step >= self._next)

    def done(self, step: int, seconds: float, *, was_deep: bool) -> None:
        """Take the time of a step that is over."""
        if was_deep:
            self._is_asked = False
            self._spent += max(0.0, seconds - self._plain) if self._plain else 0.0
            self._deep = seconds if not self._deep else (1 - _SMOOTH) * self._deep + _SMOOTH * seconds
        else:
            self._num_plain += 1
            self._plain = seconds if not self._plain else (1 - _SMOOTH) * self._plain + _SMOOTH * seconds
        is_due = self._num_plain >= _KNOWN if self._next is None else step >= self._next
        if self._share and step >= FIRST_STEPS and (was_deep or is_due):
            self._next = step + self.gap

    def after(self, step: int) -> int:
        """The next step, counted from 0, at which to ask and to take the time; those before it are plain.

        A step may differ from the others with a period, so that the stride is a prime.
        """
        if self.level == "full" or self._is_asked or step + 1 < FIRST_STEPS:
            return step + 1
        if self._share and self._num_plain < _KNOWN:
            return step + 1
        return step + STRIDE if self._next is None else min(step + STRIDE, max(step + 1, self._next))

    @property
    def gap(self) -> int:
        """Steps from one deep step to the next that keep the cost within the share."""
        if not self._share or self._plain <= 0:
            return _LEAST_GAP
        return max(_LEAST_GAP, math.ceil(max(0.0, self._deep - self._plain) / (self._share * self._plain)))

    def take_spent_ms(self) -> float:
        """The milliseconds that deep checks have cost since the last call; those of the first 20 steps do not count."""
        spent, self._spent = 1e3 * self._spent, 0.0
        return spent

    @property
    def extra_ms(self) -> float:
        """What a deep step costs more than a plain one, in milliseconds; 0 while one of them is unknown."""
        return 1e3 * max(0.0, self._deep - self._plain) if self._plain and self._deep else 0.0
