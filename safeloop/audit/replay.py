"""Replay on failure: what a turn needs to be run again is kept, and a refused turn is explained by running it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import nn

from safeloop.audit.diagnosis import Diagnosis, diagnose
from safeloop.audit.telling import told
from safeloop.faults import Fault, FaultError
from safeloop.step.bind import Operation
from safeloop.step.randomness import EVERY, RandomKeeper
from safeloop.step.report import Frame
from safeloop.step.turn import Rerun, Turn

Save = Callable[[Turn, Frame, Exception], Path | None]
"""Writes a bundle of a turn that ended in an error; None where it cannot or need not."""


class TurnReplayer:
    """Explains what the finite check refuses.

    Cost of a healthy turn: three references, and a copy of the random state where turns draw from it. Nothing else is
    copied: a turn is looked at before its update, and its buffers are those that the step keeps anyway.

    Args:
        model: what is trained.
        is_scaled: fp16, where an overflow of the gradients alone is part of finding the scale.
    """

    def __init__(self, model: nn.Module, *, is_scaled: bool) -> None:
        self.save: Save | None = None
        self._model = model
        self._is_scaled = is_scaled
        self._has_told_skip = False
        self._random = RandomKeeper({parameter.device for parameter in model.parameters()})

    def capturing(self, rerun: Rerun) -> Operation:
        """What keeps in the frame of a turn what it needs to be run again."""
        keeper = self._random

        def capture(frame: Frame) -> None:
            frame.rerun = rerun
            if not keeper.is_idle or not frame.report.step % EVERY:
                frame.random = keeper.keep(frame.report.step)

        return capture

    def ran(self, frame: Frame) -> None:
        """Look what the turn has drawn from."""
        self._random.ran(frame.random)

    def explained(self, error: FaultError, frame: Frame) -> FaultError:
        """The error with the origin of what made the finite check refuse a turn."""
        turn = frame.turn
        if turn is None:
            return error
        found = self._diagnose(turn, frame)
        faults = [error.fault, *error.others]
        is_late = not frame.faults  # read one turn later, and so without the names of parameters
        if is_late and found.faults:
            faults = list(found.faults)
        faults = [told(fault, found, frame.report.step) for fault in faults]
        if is_late and "one step later" not in faults[0].where:
            late = f"{faults[0].where}; read one step later, no weight has changed since"
            faults[0] = replace(faults[0], where=late)
        faults = self._saved(turn, frame, faults, FaultError(faults[0], faults[1:]))
        return FaultError(faults[0], faults[1:])

    def failed(self, error: Exception, frame: Frame) -> Exception:
        """The error with the bundle of its turn. A mistake that shows at the first step needs none."""
        turn = frame.turn
        if turn is None or self.save is None or not frame.report.step:
            return error
        if isinstance(error, FaultError):
            faults = self._saved(turn, frame, [error.fault, *error.others], error)
            return FaultError(faults[0], faults[1:])
        if (folder := self.save(turn, frame, error)) is not None and hasattr(error, "add_note"):
            error.add_note(f"`safeloop replay {folder}` runs this step again")
        return error

    def skipped(self, frame: Frame) -> list[Fault]:
        """The first time, what the fault would have been, as a warning."""
        is_scale = self._is_scaled and all(math.isfinite(value.item()) for value in frame.terms.values())
        turn = frame.turn
        if self._has_told_skip or turn is None or is_scale:
            return []
        self._has_told_skip = True
        found = self._diagnose(turn, frame)
        faults = [told(fault, found, frame.report.step) for fault in frame.faults]
        faults = self._saved(turn, frame, faults, FaultError(faults[0]))
        return [
            replace(
                fault, severity="warning", what=f"{fault.what}; the update was skipped, and further ones are counted"
            )
            for fault in faults
        ]

    def _diagnose(self, turn: Turn, frame: Frame) -> Diagnosis:
        return diagnose(self._model, turn, frame.report.step, frame.terms)

    def _saved(self, turn: Turn, frame: Frame, faults: list[Fault], error: FaultError) -> list[Fault]:
        folder = None if self.save is None else self.save(turn, frame, error)
        if folder is None:
            return faults
        return [replace(faults[0], where=f"{faults[0].where}; `safeloop replay {folder}` shows it again"), *faults[1:]]
