"""Binds each node of a plan to live objects, once: what a node does, as a function of the frame of a turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from safeloop.autograd.engine import run_backward
from safeloop.autograd.taps import Geometry, backward_with_taps
from safeloop.checks.graph.torch_errors import translate
from safeloop.faults import Fault, FaultError
from safeloop.optim.averaging import Average
from safeloop.optim.balancing import BalanceSpec
from safeloop.optim.combining import CombineSpec
from safeloop.optim.owner import Owner
from safeloop.plan import Adapt, Backward, Clip, Finite, Forward, Node, Schedule, Unscale, Update, Zero
from safeloop.plan import average as plan_average
from safeloop.plan.balance import Balance
from safeloop.plan.combine import CombinedBackward
from safeloop.plan.simultaneous import SeparateBackward
from safeloop.step.attendance import Attendance
from safeloop.step.balance import bind_balance
from safeloop.step.buffers import BufferKeeper
from safeloop.step.clip import clipper
from safeloop.step.combine import bind_combined
from safeloop.step.exact import exact_norms
from safeloop.step.finite import DeferredGate, ImmediateGate, gather
from safeloop.step.precision import GradientScale, Precision
from safeloop.step.reached import unreached
from safeloop.step.report import Frame, StepReport, TermGeometry
from safeloop.step.schedule import EpochSchedule, StepSchedule
from safeloop.step.simultaneous import bind_separate
from safeloop.step.terms import Evidence, TermReader, no_mapping
from safeloop.step.turn import Replayer
from safeloop.step.watch import Watch

Operation = Callable[[Frame], None]
Losses = Callable[[Any], Mapping[str, Any]]


class Observer(Protocol):
    """Watches steps and never changes them."""

    @property
    def next_look(self) -> int:
        """The first step at which `wants` is to be asked, and `done` to be told; those before it are plain."""

    def done(self, report: StepReport, seconds: float) -> None:
        """A step is over, after so many seconds."""

    def wants(self, step: int) -> bool:
        """Whether this step, which begins now, is looked at in depth."""

    def looking(self, step: int, source: str) -> AbstractContextManager[None]:
        """The call of a loss function, on a step that `wants` chose."""

    def forwarded(self, step: int) -> None:
        """Look at the model after the forward of a step that `wants` chose."""

    def evidence(self, returned: Mapping[str, Any]) -> Evidence:
        """What was seen of the terms while they were computed."""

    def differentiating(
        self, step: int, roots: Mapping[str, Tensor], wanted: Mapping[str, nn.Parameter], source: str
    ) -> None:
        """Look at the graphs of the loss terms, before the backward pass of such a step."""

    def differentiated(self, step: int, parameters: Mapping[str, nn.Parameter], source: str) -> None:
        """Look at the gradients, before the update of such a step."""

    def failed(self) -> list[Fault]:
        """What is known of an error that a backward pass has raised."""

    def faults(self, faults: list[Fault], step: int) -> None:
        """Record warnings; raise `FaultError` where one is an error."""


def equal_shares(window: Sequence[Any]) -> list[float]:
    """The same part for each micro-batch of a window."""
    return [1.0 / len(window)] * len(window)


@dataclass(frozen=True)
class Parts:
    """The live objects that a plan runs on."""

    model: nn.Module
    losses: Mapping[str, Losses]
    """phase -> its loss function"""
    readers: Mapping[str, TermReader]
    """phase -> the rules for its terms"""
    owners: Mapping[str, Owner]
    gate: ImmediateGate | DeferredGate
    observer: Observer
    precision: Precision
    measures_cut: bool = False
    """whether the steps that log compare the terms' gradients at their shared cut"""
    shares: Callable[[Sequence[Any]], list[float]] = equal_shares
    """the part of the whole that each micro-batch of a window is"""
    average: Average | None = None
    """the averaged weights"""
    epochs_over: Callable[[], int] | None = None
    """how many epochs are over, now"""
    exact_every: int | None = None
    """steps between two exact measurements of each term's gradient norm"""
    custom: Callable[[Any, Any], None] | None = None
    """the user's `custom_step`, called with its operations and a micro-batch, in place of all phases"""
    combine: CombineSpec | None = None
    """how the terms' gradients are combined; None: summed"""
    seed: int = 0
    """seed of the run"""
    keeper: BufferKeeper | None = None
    """the buffers from before each turn; None: a refused batch leaves its trace in them"""
    balance: BalanceSpec | None = None
    """how the terms' weights follow their gradients; None: they do not"""
    watch: Watch | None = None
    """measures gradients inside the forward, on the steps that log"""
    has_declared_phases: bool = False
    """whether every phase says itself what it trains"""
    attendance: Attendance | None = None
    """the list of terms over all phases; None: one of the single phase is made"""
    replayer: Replayer | None = None
    """what runs a refused turn again to find the origin of a NaN; None: nothing is kept for it"""


def bind(node: Node, parts: Parts) -> Operation:
    """The operation that a node stands for."""
    return _BINDERS[type(node)](node, parts)


def _bind_zero(node: Zero, parts: Parts) -> Operation:
    tensors = [tensor for name in node.owners for tensor in parts.owners[name].tensors]

    def zero(frame: Frame) -> None:
        for tensor in tensors:
            tensor.grad = None

    return zero


def _bind_forward(node: Forward, parts: Parts) -> Operation:
    reader, losses, observer = parts.readers[node.phase], parts.losses[node.phase], parts.observer
    precision, model, source = parts.precision, parts.model, reader.rules.source
    is_plain_format, phase = precision.format == "fp32", node.phase
    read = _bind_read(phase, parts)

    def forward(frame: Frame) -> None:
        frame.phase, frame.source = phase, source
        try:
            if frame.is_audited:
                with observer.looking(frame.report.step, source), precision.autocast():
                    returned = losses(frame.batch)
            elif is_plain_format:
                returned = losses(frame.batch)
            else:
                with precision.autocast():
                    returned = losses(frame.batch)
        except RuntimeError as error:
            _explain(error, source, model)
            raise
        if not isinstance(returned, Mapping):
            raise no_mapping(returned, source)
        if frame.is_audited:
            observer.forwarded(frame.report.step)
        read(frame, returned)

    return forward if parts.watch is None else parts.watch.during(forward)


def _bind_read(phase: str, parts: Parts) -> Callable[[Frame, Mapping[str, Any]], None]:
    """How the returned terms of a phase become roots and seeds, with every check that they get."""
    reader, observer = parts.readers[phase], parts.observer
    has_special, attendance = reader.has_special, parts.attendance or Attendance([phase])
    calls_roll, has_permitted = attendance.is_shared, bool(attendance.permitted)
    wanted = {name: reader.rules.parameters[name] for name in reader.rules.owned}

    def look(frame: Frame, given: Mapping[str, Any], returned: Mapping[str, Any]) -> None:
        step, is_audited = frame.report.step, frame.is_audited
        if returned or not given:  # terms that are not due are no mistake
            evidence = observer.evidence(returned) if is_audited else None
            observer.faults(reader.faults(returned, is_first=step == 0, evidence=evidence), step)
        if calls_roll and step == 0 and is_audited:
            observer.faults(attendance.answer(phase, given, reader.rules), 0)

    def read(frame: Frame, given: Mapping[str, Any]) -> None:
        step, returned = frame.report.step, given
        if has_special:
            reader.weigh(step)
        if has_special or any(map(callable, given.values())):
            returned = reader.due(given, step, is_audited=frame.is_audited)
            observer.faults(reader.penalties.taken(), step)
        is_plain = reader.read(returned, frame) and bool(given)
        if not is_plain or frame.is_audited:
            look(frame, given, returned)
        if not is_plain:
            reader.read_unusual(returned, frame)
        if has_permitted:
            observer.faults(attendance.note(phase, returned, reader.rules, frame), step)
        if frame.is_audited:
            roots = dict(zip(frame.root_names, frame.roots, strict=True))
            observer.differentiating(step, roots, wanted, reader.rules.source)

    return read


def _bind_backward(node: Backward, parts: Parts) -> Operation:
    source, model, scale = parts.readers[node.phase].rules.source, parts.model, parts.precision.scale
    measures_cut, observer = parts.measures_cut, parts.observer
    cut_every = parts.balance.every if parts.balance is not None and parts.balance.at == "cut" else None
    tensors = [tensor for name in node.owners for tensor in parts.owners[name].tensors]
    measure = None if parts.exact_every is None else exact_norms(lambda _: tensors, parts.exact_every, scale)

    def backward(frame: Frame) -> None:
        if not frame.roots:
            return
        seeds = frame.seeds if scale is None else scale.scaled(frame.seeds)
        try:
            if measure is not None:
                measure(frame, seeds)
            is_due = cut_every is not None and (frame.report.step + 1) % cut_every == 0
            if ((measures_cut and frame.wants_modules) or is_due) and len(frame.roots) > 1:
                _keep_geometry(frame, backward_with_taps(frame.roots, seeds), scale)
            else:
                run_backward(frame.roots, seeds)
        except RuntimeError as error:
            _explain(error, source, model, observer.failed() if frame.is_audited else ())
            raise
        frame.roots, frame.seeds, frame.root_names = [], [], []

    return backward


def _bind_separate(node: SeparateBackward, parts: Parts) -> Operation:
    return bind_separate(node, parts, lambda error, source: _explain(error, source, parts.model))


def _bind_combined(node: CombinedBackward, parts: Parts) -> Operation:
    return bind_combined(node, parts, lambda error, source: _explain(error, source, parts.model))


def _bind_unscale(node: Unscale, parts: Parts) -> Operation:
    owners, scale = [parts.owners[name] for name in node.owners], parts.precision.scale
    assert scale is not None, "an unscale node without a gradient scale"

    def unscale(frame: Frame) -> None:
        scale.unscale([gradient for owner in owners for gradient in gather(owner)])

    return unscale


def _bind_finite(node: Finite, parts: Parts) -> Operation:
    owners, gate, keeper = [parts.owners[name] for name in node.owners], parts.gate, parts.keeper
    observer, attendance = parts.observer, parts.attendance
    parameters = {name: parameter for owner in owners for name, parameter in owner.parameters.items()}
    find_unreached = None
    if parts.has_declared_phases and attendance is not None:
        find_unreached = unreached(owners, attendance)

    def finite(frame: Frame) -> None:
        try:
            gate.check(frame, owners)
        except FaultError:
            if keeper is not None:  # a custom step keeps once for all its updates
                is_same_step = parts.custom is not None and gate.refused and gate.refused.report is frame.report
                keeper.restore(turns=1 if is_same_step else None)
            raise
        if frame.is_skipped and keeper is not None:
            keeper.restore()
        if frame.is_audited:
            observer.differentiated(frame.report.step, parameters, frame.source)
        if find_unreached is not None:
            observer.faults(find_unreached(frame), frame.report.step)

    return finite


def _bind_clip(node: Clip, parts: Parts) -> Operation:
    return clipper(parts.owners[node.owner])


def _bind_update(node: Update, parts: Parts) -> Operation:
    owner = parts.owners[node.owner]
    name, step, direct, tensors, bumps = owner.name, owner.permit.step, owner.direct, owner.tensors, owner.is_fused

    def update(frame: Frame) -> None:
        if frame.is_skipped or not frame.gradients[name]:  # nothing was due, or nothing reached it: no update
            return
        if direct is None:
            step()
        else:
            direct(frame.gradients[name])
        if bumps:  # a fused kernel leaves version counters as they were: a stale graph would pass unnoticed
            torch.autograd.graph.increment_version(tensors)
        frame.report.updated.add(name)

    return update


def _bind_schedule(node: Schedule, parts: Parts) -> Operation:
    name, scheduler = node.owner, parts.owners[node.owner].scheduler
    assert scheduler is not None, f"{name} is planned to be scheduled but has no schedule"
    if node.per == "step":
        return StepSchedule(name, scheduler)
    assert parts.epochs_over is not None, f"{name} is planned to be scheduled by epochs, and nobody counts them"
    return EpochSchedule(name, scheduler, parts.epochs_over)


def _bind_average(node: plan_average.Average, parts: Parts) -> Operation:
    average, model = parts.average, parts.model
    assert average is not None, "an average node without an average"

    def average_weights(frame: Frame) -> None:
        if frame.report.updated:
            average.update(model, frame.report.step + 1)

    return average_weights


def _bind_adapt(node: Adapt, parts: Parts) -> Operation:
    scale = parts.precision.scale
    assert scale is not None, "an adapt node without a gradient scale"

    def adapt(frame: Frame) -> None:
        scale.adapt()

    return adapt


_BINDERS: Mapping[type[Node], Callable[[Any, Parts], Operation]] = {
    Zero: _bind_zero,
    Forward: _bind_forward,
    Backward: _bind_backward,
    SeparateBackward: _bind_separate,
    CombinedBackward: _bind_combined,
    Unscale: _bind_unscale,
    Finite: _bind_finite,
    Clip: _bind_clip,
    Update: _bind_update,
    Schedule: _bind_schedule,
    Adapt: _bind_adapt,
    plan_average.Average: _bind_average,
    Balance: bind_balance,
}


def _keep_geometry(frame: Frame, geometry: Geometry | None, scale: GradientScale | None) -> None:
    """Of a window, the last micro-batch's; without the gradient scale."""
    if geometry is None:
        return
    names = tuple(frame.root_names)
    norms = geometry.norms if scale is None else geometry.norms / scale.value
    others = [known for known in frame.report.geometry if known.names != names]
    frame.report.geometry = [*others, TermGeometry(names, norms, geometry.cosines, geometry.pairs)]


def _explain(error: RuntimeError, source: str, model: nn.Module, known: Sequence[Fault] = ()) -> None:
    """Raise the fault that explains torch's own error; return where we cannot say more than torch does."""
    fault = translate(error, terms_source=source, model=model)
    if fault is not None:
        first, *others = [*known, fault]
        raise FaultError(first, others) from error
