"""`evaluate`: the metrics of a whole data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from safeloop.evaluation.pool import Pool
from safeloop.evaluation.preserved import batch_preserved, modes_of, preserved, set_modes

_Function = TypeVar("_Function", bound=Callable[..., Any])
_MARK = "_safeloop_needs_grad"


def needs_grad(metrics: _Function) -> _Function:
    """Mark a `metrics` that takes gradients with respect to its inputs; gradients of parameters stay off."""
    setattr(metrics, _MARK, True)
    return metrics


def wants_grad(metrics: Callable[..., Any]) -> bool:
    """Whether `metrics`, a function or a method, is marked with `needs_grad`."""
    return bool(getattr(metrics, _MARK, False))


def evaluate(
    metrics: Callable[[Any], Mapping[str, Any]],
    model: nn.Module,
    batches: Iterable[Any],
    *,
    count: Callable[[Any], int],
    wants_grad: bool = False,
    seed: int | None = None,
    where: str = "",
) -> dict[str, float]:
    """The metrics of a whole data set, in the order in which `metrics` names them.

    A tensor with a dimension is pooled element by element, a single number is weighted by `count(batch)`, sums in
    float64; an object with update/compute/reset is computed once at the end and reset. `metrics` runs in eval mode
    without gradients (`wants_grad`: with gradients, but the parameters' are off). Values stay on the device until the
    end: one transfer in all.

    Afterwards the random state, each module's mode, buffers, `.grad`, `requires_grad` and the grad mode are bitwise
    what they were, also when `metrics` raises or changes them. `seed` makes random draws inside repeatable; `where`,
    the place where `metrics` is defined, goes into faults. Costs a copy of the buffers.

    Raises:
        FaultError: SL701 when a value cannot be pooled, SL851 when there is no batch.
    """
    pool = Pool(where)
    with preserved(model, freeze=wants_grad, seed=seed):
        model.eval()
        modes = modes_of(model)
        try:
            for batch in batches:
                set_modes(modes)
                with torch.set_grad_enabled(wants_grad), batch_preserved(batch) if wants_grad else nullcontext():
                    pool.add(metrics(batch), partial(count, batch))
            with torch.no_grad():
                return pool.results()
        finally:
            pool.reset()
