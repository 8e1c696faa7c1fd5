"""Binds each node of a plan to live objects, once: what a node does, as a function of the frame of a turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from safeloop.checks.graph.torch_errors import translate
from safeloop.faults import Fault, FaultError
from safeloop.optim.owner import Owner
from safeloop.plan import Adapt, Backward, Clip, Finite, Forward, Node, Schedule, Unscale, Update, Zero
from safeloop.step.finite import DeferredGate, ImmediateGate, gather
from safeloop.step.precision import Precision
from safeloop.step.report import Frame
from safeloop.step.terms import TermReader

Operation = Callable[[Frame], None]
Losses = Callable[[Any], Mapping[str, Any]]


class Observer(Protocol):
    """Watches steps and never changes them."""

    def wants(self, step: int) -> bool:
        """Whether this step is looked at in depth."""

    def forwarded(self, step: int) -> None:
        """Look at the model after the forward of a step that `wants` chose."""

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
    shares: Callable[[Sequence[Any]], list[float]] = equal_shares
    """the part of the whole that each micro-batch of a window is"""


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
    is_plain_format = precision.format == "fp32"

    def forward(frame: Frame) -> None:
        try:
            if is_plain_format:
                returned = losses(frame.batch)
            else:
                with precision.autocast():
                    returned = losses(frame.batch)
        except RuntimeError as error:
            _explain(error, source, model)
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
    source, model, scale = parts.readers[node.phase].rules.source, parts.model, parts.precision.scale

    def backward(frame: Frame) -> None:
        if not frame.roots:
            return
        seeds = frame.seeds if scale is None else scale.scaled(frame.seeds)
        try:
            torch.autograd.backward(frame.roots, seeds)
        except RuntimeError as error:
            _explain(error, source, model)
            raise
        frame.roots, frame.seeds, frame.root_names = [], [], []

    return backward


def _bind_unscale(node: Unscale, parts: Parts) -> Operation:
    owners, scale = [parts.owners[name] for name in node.owners], parts.precision.scale
    assert scale is not None, "an unscale node without a gradient scale"

    def unscale(frame: Frame) -> None:
        scale.unscale([gradient for owner in owners for gradient in gather(owner)])

    return unscale


def _bind_finite(node: Finite, parts: Parts) -> Operation:
    owners, gate = [parts.owners[name] for name in node.owners], parts.gate

    def finite(frame: Frame) -> None:
        gate.check(frame, owners)

    return finite


def _bind_clip(node: Clip, parts: Parts) -> Operation:
    name, max_norm = node.owner, node.max_norm
    surely_below = max_norm * (1 - 1e-5) - 2e-6

    def clip(frame: Frame) -> None:
        norm = frame.report.norms.get(name)
        if frame.is_skipped or name not in frame.totals or (isinstance(norm, float) and norm < surely_below):
            return
        coefficient = torch.clamp(max_norm / (frame.totals[name] + 1e-6), max=1.0)
        for gradients in _by_kind(frame.gradients[name]):
            torch._foreach_mul_(gradients, coefficient.to(gradients[0].device))

    return clip


def _bind_update(node: Update, parts: Parts) -> Operation:
    owner = parts.owners[node.owner]
    name, step, direct, tensors, bumps = owner.name, owner.optimizer.step, owner.direct, owner.tensors, owner.is_fused

    def update(frame: Frame) -> None:
        if frame.is_skipped:
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

    def schedule(frame: Frame) -> None:
        if name in frame.report.updated:
            scheduler.step()

    return schedule


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
    Unscale: _bind_unscale,
    Finite: _bind_finite,
    Clip: _bind_clip,
    Update: _bind_update,
    Schedule: _bind_schedule,
    Adapt: _bind_adapt,
}


def _by_kind(gradients: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    kinds: dict[tuple[torch.device, torch.dtype, torch.layout], list[torch.Tensor]] = {}
    for gradient in gradients:
        kinds.setdefault((gradient.device, gradient.dtype, gradient.layout), []).append(gradient)
    return list(kinds.values())


def _explain(error: RuntimeError, source: str, model: nn.Module) -> None:
    """Raise the fault that explains torch's own error; return where we cannot say more than torch does."""
    fault = translate(error, terms_source=source, model=model)
    if fault is not None:
        raise FaultError(fault) from error
