"""Finds optimizers that a declared phase trains and never reaches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from safeloop.checks.terms.phases import PhaseReachesNothing
from safeloop.faults import Fault
from safeloop.optim.owner import Owner
from safeloop.step.report import Frame

if TYPE_CHECKING:
    from safeloop.step.attendance import Attendance


def unreached(owners: Sequence[Owner], attendance: Attendance) -> Callable[[Frame], list[Fault]]:
    """A function of the frame that finds, after the backward pass, optimizers without any gradient.

    It looks on the first step if that is audited. While a permitted term is left out, it may be the one that reaches
    them: then it looks again on later steps, until they have been reached or nothing excuses them.
    """
    waiting: list[Owner] = []

    def find(frame: Frame) -> list[Fault]:
        if frame.report.step == 0:
            waiting[:] = owners if frame.is_audited else ()
        if not waiting:
            return []
        waiting[:] = [owner for owner in waiting if not frame.gradients[owner.name]]
        if not waiting or len(waiting) == len(owners) or attendance.may_be_missed_by(frame.phase, frame):
            return []
        idle = [owner.name for owner in waiting]
        waiting.clear()
        return [_fault(idle, frame.source)]

    return find


def _fault(idle: list[str], source: str) -> Fault:
    return PhaseReachesNothing.fault(
        f"the losses of the phase reach no parameter of `{idle[0]}`, which it trains",
        where=source,
        fix=f"take `{idle[0]}` out of its `trains`, or look for a detach() between its parameters and the losses",
        names=idle,
    )
