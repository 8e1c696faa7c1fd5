"""The balance operation: new weights for a phase's loss terms, by the norms that its backward pass measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safeloop.checks.update.balance import NothingToBalance
from safeloop.plan.balance import Balance
from safeloop.step.report import Frame

if TYPE_CHECKING:
    from safeloop.step.bind import Parts


def bind_balance(node: Balance, parts: Parts) -> Callable[[Frame], None]:
    """The operation: one sync on the steps that are due, nothing on the others."""
    reader, spec = parts.readers[node.phase], parts.balance
    assert spec is not None, "a balance node without a rule"
    weights, scheduled = reader.rules.weights, reader.rules.schedules
    wanted = dict(weights)

    def balance(frame: Frame) -> None:
        if (frame.report.step + 1) % node.every or frame.is_skipped:
            return
        measured = _at_cut(frame) if node.at == "cut" else frame.report.exact_norms
        names = [name for name in frame.terms if name in measured and name not in scheduled]
        if node.at == "cut" and len(frame.terms) > 1 and not names:
            raise NothingToBalance.error(
                f"the terms {', '.join(f'`{name}`' for name in frame.terms)} share no features",
                where=frame.source,
                fix="set `balance.at: parameters`",
            )
        present = {name: weights.get(name, 1.0) for name in names}
        shares = {name: wanted.get(name, 1.0) for name in names}
        norms = dict(zip(names, _to_host([measured[name] for name in names]), strict=True))
        reader.set_weights(new := spec.adjusted(present, shares, norms))
        frame.report.balanced |= new

    return balance


def _at_cut(frame: Frame) -> dict[str, Tensor]:
    return {name: norm for one in frame.report.geometry for name, norm in zip(one.names, one.norms, strict=True)}


def _to_host(norms: Sequence[Tensor]) -> list[float]:
    return torch.stack([norm.double() for norm in norms]).tolist() if norms else []
