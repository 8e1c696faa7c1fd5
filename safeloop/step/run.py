"""The executor: runs a bound plan once, phase after phase, turn after turn."""

from __future__ import annotations

import time
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from safeloop.plan import Backward, Finite, Forward, Phase, StepPlan, Zero
from safeloop.plan.closure import ClosureUpdate
from safeloop.plan.plan import refuse_several
from safeloop.step.bind import Operation, Parts, bind
from safeloop.step.buffers import BufferKeeper
from safeloop.step.closure import ClosureOperation, bind_closure
from safeloop.step.custom import CustomRun
from safeloop.step.ended import DataEnded, half_done
from safeloop.step.report import Frame, StepReport
from safeloop.step.turn import Rerun, capturing, explaining, failing, rerun_of
from safeloop.step.window import WindowGuard


class Draw(Protocol):
    """Gives micro-batches on the device; whatever it raises passes through before anything is changed."""

    def __call__(self) -> Any:
        """The next micro-batch."""

    def window(self, size: int) -> list[Any]:
        """The next `size` micro-batches, fewer at the end of an epoch."""

    def expect(self, windows: int, size: int) -> None:
        """Raise `DataEnded` where so many windows of at most `size` micro-batches are known not to come."""


@dataclass(frozen=True, slots=True)
class _BoundPhase:
    """A phase whose nodes are operations on live objects."""

    repeat: int
    every: int
    micro_batches: int
    shares: Callable[[Sequence[Any]], list[float]]
    others: tuple[nn.Parameter, ...]
    """parameters that the phase does not train"""
    before: tuple[Operation, ...]
    inner: tuple[Operation, ...]
    """forward and backward: once for each micro-batch"""
    after: tuple[Operation, ...]
    failed: Callable[[Exception, Frame], Exception]
    """what becomes of an error that ends a turn"""
    rerun: Rerun | None = None
    """how to run forward and backward once more"""
    closure: ClosureOperation | None = None
    """instead of all these: an update that runs forward and backward itself"""


class Program:
    """A plan bound to live objects: one operation for each node, ready to run.

    Raises:
        FaultError: SL601, a phase has several forwards or backwards.
    """

    def __init__(self, plan: StepPlan, parts: Parts) -> None:
        self.observer = parts.observer
        self.custom = None if parts.custom is None else CustomRun(parts.custom, parts)
        self.phases = [] if parts.custom is not None else [_bound(phase, parts) for phase in plan.phases]
        self.closing = tuple(bind(node, parts) for node in plan.closing)
        self.owners = tuple(parts.owners)
        self.window = max((phase.micro_batches for phase in self.phases), default=1)
        self.has_turns = sum(phase.repeat for phase in self.phases) > 1
        """whether a step may need several windows"""

    def turns(self, step: int) -> int:
        """How many windows of micro-batches a step needs; of a custom step, the least."""
        return sum(phase.repeat for phase in self.phases if step % phase.every == 0) if self.phases else 1

    def steps_in(self, windows: int) -> int:
        """How many steps, from the first, so many windows are enough for."""

        def is_too_many(steps: int) -> bool:
            needed = sum(phase.repeat * -(-steps // phase.every) for phase in self.phases) if self.phases else steps
            return needed > windows

        longest = windows * max((phase.every for phase in self.phases), default=1) + 1
        return bisect(range(longest + 1), False, key=is_too_many) - 1

    def rerun(self, phase: str) -> Rerun | None:
        """How to run a phase once more, outside of a step; None where there is no such phase."""
        return next((bound.rerun for bound in self.phases if bound.rerun and bound.rerun.phase == phase), None)


def run_step(program: Program, draw: Draw, step: int, *, wants_modules: bool = False) -> StepReport:
    """One pass through the plan; not begun where the data is known to end within it.

    Args:
        program: the bound plan.
        draw: where micro-batches come from.
        step: how many steps were finished before.
        wants_modules: whether to keep the norm of each gradient in the report.

    Raises:
        FaultError: before any parameter has been changed by what it is about.
        DataEnded: there is no further micro-batch; SL857 is told where that broke the step off.
    """
    report = StepReport(step)
    observer = program.observer
    is_plain = step < observer.next_look
    is_audited = not is_plain and observer.wants(step)
    started = 0.0 if is_plain else time.perf_counter()
    if program.has_turns:
        draw.expect(program.turns(step), program.window)
    try:
        _run(program, draw, report, is_audited, wants_modules)
    except DataEnded:
        observer.faults(half_done(report, program.owners), step)
        raise
    if not is_plain:
        observer.done(report, time.perf_counter() - started)
    return report


def _run(program: Program, draw: Draw, report: StepReport, is_audited: bool, wants_modules: bool) -> None:
    step = report.step
    if not torch.is_grad_enabled():
        torch.set_grad_enabled(True)
    if program.custom is not None:
        program.custom(draw, report, is_audited=is_audited, wants_modules=wants_modules)
    for phase in program.phases:
        if step % phase.every:
            continue
        if phase.others:
            _run_confined(phase, draw, report, is_audited, wants_modules)
        else:
            _run_turns(phase, draw, report, is_audited, wants_modules)
    if program.closing:
        frame = Frame(report)
        for operate in program.closing:
            operate(frame)


def _run_confined(phase: _BoundPhase, draw: Draw, report: StepReport, is_audited: bool, wants_modules: bool) -> None:
    """The turns of a phase while everything that it does not train is frozen; only what was trainable thaws again."""
    frozen = [parameter for parameter in phase.others if parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad = False
        _run_turns(phase, draw, report, is_audited, wants_modules)
    finally:
        for parameter in frozen:
            parameter.requires_grad = True


def _run_turns(phase: _BoundPhase, draw: Draw, report: StepReport, is_audited: bool, wants_modules: bool) -> None:
    for _ in range(phase.repeat):
        frame = Frame(report, is_audited=is_audited, wants_modules=wants_modules)
        frame.window = (draw(),) if phase.micro_batches == 1 else draw.window(phase.micro_batches)
        try:
            _run_turn(phase, frame)
        except Exception as error:
            told = phase.failed(error, frame)
            if told is error:
                raise
            raise told from error.__cause__
        report.terms.update(frame.terms)
        for name, part in frame.inactive.items():
            report.inactive[name] = report.inactive.get(name, 0.0) + part / phase.repeat
        report.num_skipped += frame.is_skipped


def _run_turn(phase: _BoundPhase, frame: Frame) -> None:
    if phase.closure is not None:
        phase.closure(frame, frame.window)
        return
    for operate in phase.before:
        operate(frame)
    if phase.micro_batches == 1:
        frame.batch = frame.window[0]
        for operate in phase.inner:
            operate(frame)
    else:
        window = frame.window
        for frame.batch, frame.share in zip(window, phase.shares(window), strict=True):
            for operate in phase.inner:
                operate(frame)
    for operate in phase.after:
        operate(frame)


def _keep(keeper: BufferKeeper) -> Operation:
    def keep(frame: Frame) -> None:
        keeper.keep()

    return keep


def _bound(phase: Phase, parts: Parts) -> _BoundPhase:
    refuse_several(phase)
    closure = next((node for node in phase.nodes if isinstance(node, ClosureUpdate)), None)
    nodes = () if closure is not None else phase.nodes
    inner = [i for i, node in enumerate(nodes) if isinstance(node, (Forward, Backward))]
    first, last = (inner[0], inner[-1] + 1) if inner else (0, 0)
    operations = tuple(
        explaining(bind(node, parts), parts) if isinstance(node, Finite) else bind(node, parts) for node in nodes
    )
    rerun = rerun_of(phase.name, nodes if closure is None else closure.inner, parts, bind)
    keeps: tuple[Operation, ...] = () if parts.keeper is None else (_keep(parts.keeper),)
    owned = {n: p for name in phase.trains for n, p in parts.owners[name].parameters.items()} if inner else {}
    is_zeroed = any(isinstance(node, Zero) for node in nodes[:first])
    guard = WindowGuard(owned, parts.observer, is_window=phase.micro_batches > 1)
    trained = {id(tensor) for name in phase.trains for tensor in parts.owners[name].tensors}
    others = (p for owner in parts.owners.values() for p in owner.tensors if id(p) not in trained)
    return _BoundPhase(
        phase.repeat,
        phase.every,
        phase.micro_batches,
        parts.shares,
        tuple(others),
        (*keeps, *capturing(parts, rerun), *operations[:first], *([guard.begin] if phase.micro_batches > 1 else [])),
        guard.around(nodes[first:last], operations[first:last]) if is_zeroed else operations[first:last],
        operations[last:],
        failing(parts),
        rerun,
        None if closure is None else bind_closure(closure, parts, rerun),
    )
