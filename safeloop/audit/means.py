"""Notes over how many values a loss takes its mean."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from safeloop.autograd.lineage import Mark
from safeloop.autograd.tape import Call

_NAMES = {
    "cross_entropy": ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction"),
    "nll_loss": ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction"),
}


def count_means(call: Call) -> None:
    """Mark the result of a mean over targets with their number; padding that is ignored does not count."""
    given: dict[str, Any] = dict(zip(_NAMES[call.name], call.args, strict=False)) | dict(call.kwargs)
    target = given.get("target")
    if not isinstance(target, Tensor) or target.is_floating_point() or given.get("reduction", "mean") != "mean":
        return
    if isinstance(call.out, Tensor):
        number = int((target != given.get("ignore_index", -100)).sum())
        call.tape.mark(call.out, Mark("mean", str(number), "", call.site, call.tape.module, 0))
