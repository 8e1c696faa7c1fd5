"""The executor: binds a plan to live objects once, then runs it step after step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from safeloop.checks.graph.torch_errors import translate
from safeloop.faults import Fault, FaultError
from safeloop.optim.owner import Owner
from safeloop.plan import Backward, Clip, Finite, Forward, Node, Schedule, StepPlan, Update, Zero
from safeloop.step.finite import DeferredGate, ImmediateGate
from safeloop.step.report import Frame, StepReport
from safeloop.step.terms import TermReader

Operation = Callable[[Frame], None]


class Observer(Protocol):
    """Watches steps and never changes them."""

    def wants(self, step: int) -> bool:
        """Whether this step is looked at in depth."""

    def forwarded(self, step: int) -> None:
        """Look at the model after the forward of a step that `wants` chose."""

    def faults(self, faults: list[Fault], step: int) -> None:
        """Record warnings; raise `FaultError` where one is an error."""


@dataclass(frozen=True)
class Parts:
    """The live objects that a plan runs on."""

    model: nn.Module
    losses: Callable[[Any], Mapping[str, Any]]
    owners: Mapping[str, Owner]
    reader: TermReader
    gate: ImmediateGate | DeferredGate
    observer: Observer


class Program:
    """A plan bound to live objects: one operation for each node, ready to run."""

    def __init__(self, plan: StepPlan, parts: Parts) -> None:
        self.observer = parts.observer
        self.phases = [
            (phase.repeat, tuple(_BINDERS[type(node)](node, parts) for node in phase.nodes)) for phase in plan.phases
        ]


def run_step(program: Program, draw: Callable[[], Any], step: int, *, wants_modules: bool = False) -> StepReport:
    """One pass through the plan.

    Args:
        program: the bound plan.
        draw: gives the next micro-batch, on the device; whatever it raises passes through before anything is changed.
        step: how many steps were finished before.
        wants_modules: whether to keep the norm of each gradient in the report.

    Raises:
        FaultError: before any parameter has changed.
    """
    report = StepReport(step)
    is_audited = program.observer.wants(step)
    if not torch.is_grad_enabled():
        torch.set_grad_enabled(True)
    for repeat, operations in program.phases:
        for _ in range(repeat):
            frame = Frame(report, draw(), is_audited, wants_modules)
            for operate in operations:
                operate(frame)
    return report


def _bind_zero(node: Zero, parts: Parts) -> Operation:
    tensors = [tensor for name in node.owners for tensor in parts.owners[name].tensors]

    def zero(frame: Frame) -> None:
        for tensor in tensors:
            tensor.grad = None

    return zero


def _bind_forward(node: Forward, parts: Parts) -> Operation:
    reader, losses, observer = parts.reader, parts.losses, parts.observer

    def forward(frame: Frame) -> None:
        try:
            returned = losses(frame.batch)
        except RuntimeError as error:
            _explain(error, parts)
            raise
        if frame.is_audited:
            observer.forwarded(frame.report.step)
        is_plain = reader.read(returned, frame)
        if not is_plain or frame.is_audited:
            observer.faults(reader.faults(returned, is_first=frame.report.step == 0), frame.report.step)
        if not is_plain:
            reader.read_unusual(returned, frame)

    return forward


def _bind_backward(node: Backward, parts: Parts) -> Operation:
    def backward(frame: Frame) -> None:
        if not frame.roots:
            return
        try:
            torch.autograd.backward(frame.roots, frame.seeds)
        except RuntimeError as error:
            _explain(error, parts)
            raise
        frame.roots = []

    return backward


def _bind_finite(node: Finite, parts: Parts) -> Operation:
    return parts.gate.check


def _bind_clip(node: Clip, parts: Parts) -> Operation:
    name, max_norm = node.owner, node.max_norm
    surely_below = max_norm * (1 - 1e-5) - 2e-6

    def clip(frame: Frame) -> None:
        norm = frame.report.norms.get(name)
        if frame.report.is_skipped or norm is None or (isinstance(norm, float) and norm < surely_below):
            return
        coefficient = torch.clamp(max_norm / (frame.totals[name] + 1e-6), max=1.0)
        for gradients in _by_kind(frame.gradients[name]):
            torch._foreach_mul_(gradients, coefficient.to(gradients[0].device))

    return clip


def _bind_update(node: Update, parts: Parts) -> Operation:
    owner = parts.owners[node.owner]
    name, step, direct, tensors, bumps = owner.name, owner.optimizer.step, owner.direct, owner.tensors, owner.is_fused

    def update(frame: Frame) -> None:
        if frame.report.is_skipped:
            return
        if direct is None:
            step()
        else:
            direct(frame.gradients[name])
        if bumps:  # a fused kernel leaves version counters as they were: a stale graph would pass unnoticed
            torch.autograd.graph.increment_version(tensors)

    return update


def _bind_schedule(node: Schedule, parts: Parts) -> Operation:
    scheduler = parts.owners[node.owner].scheduler
    assert scheduler is not None, f"{node.owner} is planned to be scheduled but has no schedule"

    def schedule(frame: Frame) -> None:
        if not frame.report.is_skipped:
            scheduler.step()

    return schedule


_BINDERS: Mapping[type[Node], Callable[[Any, Parts], Operation]] = {
    Zero: _bind_zero,
    Forward: _bind_forward,
    Backward: _bind_backward,
    Finite: _bind_finite,
    Clip: _bind_clip,
    Update: _bind_update,
    Schedule: _bind_schedule,
}


def _by_kind(gradients: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    kinds: dict[tuple[torch.device, torch.dtype, torch.layout], list[torch.Tensor]] = {}
    for gradient in gradients:
        kinds.setdefault((gradient.device, gradient.dtype, gradient.layout), []).append(gradient)
    return list(kinds.values())


def _explain(error: RuntimeError, parts: Parts) -> None:
    """Raise the fault that explains torch's own error; return where we cannot say more than torch does."""
    fault = translate(error, terms_source=parts.reader.rules.source, model=parts.model)
    if fault is not None:
        raise FaultError(fault) from error
