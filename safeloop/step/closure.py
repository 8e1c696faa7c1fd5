"""Runs an update that needs a closure: the same window for every evaluation, all or nothing for the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from safeloop.checks.gradients.nonfinite import NonFiniteGradient
from safeloop.faults import FaultError
from safeloop.plan import Backward, Finite
from safeloop.plan.closure import ClosureUpdate
from safeloop.step.bind import Operation, Parts, bind
from safeloop.step.finite import ImmediateGate
from safeloop.step.report import Frame
from safeloop.step.turn import Rerun, capturing, explaining
from safeloop.step.window import WindowGuard

ClosureOperation = Callable[[Frame, Sequence[Any]], None]


class _NothingDue(Exception):
    """No term counts on this step: there is no loss that the optimizer could ask for."""


def bind_closure(node: ClosureUpdate, parts: Parts, rerun: Rerun | None = None) -> ClosureOperation:
    """The operation that a closure update stands for: a function of the frame of a turn and its micro-batches."""
    owner, keeper = parts.owners[node.owner], parts.keeper
    operations = [_bound(inner, parts) for inner in node.inner]
    end = max(index for index, inner in enumerate(node.inner) if isinstance(inner, Backward)) + 1
    zero, after = operations[0], operations[end:]
    guard = WindowGuard(owner.parameters, parts.observer, is_window=True)
    per_batch = guard.around(node.inner[1:end], operations[1:end])
    captures = capturing(parts, None if rerun is None else replace(rerun, keeper=keeper))
    weights = next(reader.rules.weights for reader in parts.readers.values())

    def update(frame: Frame, window: Sequence[Any]) -> None:
        shares = [None] if len(window) == 1 else parts.shares(window)
        before = [tensor.detach().clone() for tensor in owner.tensors]
        if keeper is not None:
            keeper.keep()
        first_terms: dict[str, Tensor] = {}

        def evaluate() -> Tensor:
            inner = Frame(frame.report, wants_modules=frame.wants_modules)
            inner.is_audited = frame.is_audited and not first_terms
            inner.window = window
            for operate in (*captures, zero):
                operate(inner)
            guard.begin()
            for inner.batch, inner.share in zip(window, shares, strict=True):
                for operate in per_batch:
                    operate(inner)
            for operate in after:
                operate(inner)
            if not first_terms:
                first_terms.update(inner.terms)
                frame.inactive = inner.inactive
            return _total(inner.terms, weights)

        try:
            owner.permit.step(evaluate)
            _refuse_non_finite(owner.parameters, frame)
        except _NothingDue:
            return
        except BaseException:
            _put_back(owner.tensors, before)
            if keeper is not None:
                keeper.restore()
            raise
        frame.terms = first_terms
        frame.report.updated.add(owner.name)

    return update


def _total(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    if not terms:
        raise _NothingDue
    return torch.stack([value * weights.get(name, 1.0) for name, value in terms.items()]).sum()


def _put_back(tensors: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(old)


def _bound(node: Any, parts: Parts) -> Operation:
    if isinstance(node, Finite):  # an evaluation cannot be skipped: the search would go on from half an answer
        gate, owners = ImmediateGate(), [parts.owners[name] for name in node.owners]
        return explaining(lambda frame: gate.check(frame, owners), replace(parts, gate=gate))
    return bind(node, parts)


def _refuse_non_finite(parameters: dict[str, torch.nn.Parameter], frame: Frame) -> None:
    bad = [name for name, parameter in parameters.items() if not bool(parameter.isfinite().all())]
    if bad:
        raise FaultError(
            NonFiniteGradient.fault(
                f"the update made {len(bad)} of {len(parameters)} parameters non-finite (`{bad[0]}`); taken back",
                where=f"step {frame.report.step}",
                why="without a line search, the step of LBFGS can be too long",
                fix="set `line_search_fn: strong_wolfe`, or a smaller `lr`",
                names=bad,
            )
        )
