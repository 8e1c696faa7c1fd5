"""The clip operation: limits the gradients of one owner, and tells the report what it changed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from safeloop.autograd.norms import each_norm
from safeloop.optim.clipping import (
    ClipAdaptively,
    ClipByNorm,
    ClipByValue,
    clip_adaptively,
    clip_by_norm,
    clip_by_value,
    largest_entry,
)
from safeloop.optim.owner import Owner
from safeloop.step.report import Frame

Operation = Callable[[Frame], None]
_SLACK = 1e-5
"""Relative rounding of a norm: below the limit by more than this, nothing can be clipped."""


def clipper(owner: Owner) -> Operation:
    """The operation that clips an owner's gradients as its `clipping` says; nothing waits for the device."""
    if isinstance(owner.clipping, ClipByValue):
        clip = _by_value(owner.name, owner.clipping)
    elif isinstance(owner.clipping, ClipAdaptively):
        clip = _adaptively(owner, owner.clipping)
    else:
        assert owner.clipping is not None, f"{owner.name} is planned to be clipped but has no limit"
        clip = _by_norm(owner.name, owner.clipping)

    def clip_if_whole(frame: Frame) -> None:
        if not frame.is_skipped and owner.name in frame.totals:
            clip(frame)

    return clip_if_whole


def _by_norm(name: str, clipping: ClipByNorm) -> Operation:
    limit = clipping.limit
    surely_below = limit * (1 - _SLACK) - 2e-6

    def clip(frame: Frame) -> None:
        norm = frame.report.norms[name]
        frame.report.clipped[name] = norm > limit
        if not isinstance(norm, float) or norm >= surely_below:
            clip_by_norm(frame.gradients[name], frame.totals[name], limit)

    return clip


def _by_value(name: str, clipping: ClipByValue) -> Operation:
    limit = clipping.limit
    surely_below = limit * (1 - _SLACK)

    def clip(frame: Frame) -> None:
        norm, gradients = frame.report.norms[name], frame.gradients[name]
        if isinstance(norm, float) and norm < surely_below:
            frame.report.clipped[name] = 0.0
        else:
            frame.report.clipped[name] = largest_entry(gradients) > limit
            clip_by_value(gradients, limit)
        _measure(name, frame)

    return clip


def _adaptively(owner: Owner, clipping: ClipAdaptively) -> Operation:
    name, limit, eps = owner.name, clipping.limit, clipping.eps
    limited = [parameter for full, parameter in owner.parameters.items() if full not in clipping.exempt]

    def clip(frame: Frame) -> None:
        pairs = [(parameter.grad, parameter) for parameter in limited if parameter.grad is not None]
        if pairs:
            gradients, weights = zip(*pairs, strict=True)
            dtype = torch.promote_types(frame.totals[name].dtype, torch.float32)
            frame.report.clipped[name] = clip_adaptively(gradients, weights, limit, eps, dtype)
        _measure(name, frame)

    return clip


def _measure(name: str, frame: Frame) -> None:
    """The norm after clipping, on the steps that log: unlike a clipped norm, it does not follow from the one before."""
    if frame.wants_modules:
        frame.report.clipped_norms[name] = torch.linalg.vector_norm(each_norm(frame.gradients[name]))
