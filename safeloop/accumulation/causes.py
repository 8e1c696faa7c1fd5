"""Why accumulated gradients differ from those of one big batch: each cause is tried, and what it explains measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from safeloop.accumulation.passes import Gradients, Window
from safeloop.checks.update.accumulation import AccumulationDiffers
from safeloop.data.structure import tensors
from safeloop.faults import Fault

_MAX_ENTRIES = 2**16
"""gradient entries, evenly spread, from which weights of the micro-batches are found"""
_SLACK = 10.0
"""weights explain the big batch where they leave fewer tolerances than this"""
_IGNORED = (-1, -100)
"""labels that losses leave out"""


@dataclass(frozen=True)
class _Cause:
    """One reason: what was measured, what it means, what to do."""

    what: str
    why: str
    fix: str
    names: tuple[str, ...] = ()
    left: float = 0.0
    """tolerances that it leaves unexplained"""


@dataclass(frozen=True)
class _Weighting:
    """Weights that may explain the big batch, and what they would mean."""

    weights: Sequence[float]
    why: str
    fix: str


@dataclass(frozen=True)
class _Group:
    """Modules that treat a micro-batch otherwise than a part of a big batch."""

    modules: dict[str, nn.Module]
    why: str
    fix: str


def fault(window: Window, found: Mapping[str, float], ratios: Mapping[str, float], shares: Sequence[float]) -> Fault:
    """What differs, and the causes, the one that explains most first.

    Args:
        window: the phase and its micro-batches.
        found: owner -> relative difference.
        ratios: owner -> norm of the accumulated gradient / norm of the big batch's.
        shares: the part of the window that each micro-batch counts as.
    """
    apart = [name for name, size in found.items() if not size <= window.tolerances[name]]
    what = [
        f"phase `{window.phase.name}`, `{name}`: the accumulated gradient is off by {found[name]:.2g} of that of one "
        f"big batch (at most {window.tolerances[name]:g}); its norm is {ratios[name]:.4g} times as large"
        for name in apart
    ]
    groups = _unsteady(window.given.model)
    causes = sorted((_of_modules(window, group, shares) for group in groups), key=lambda cause: cause.left)
    still = [module for group in groups for module in group.modules.values()]
    if not groups or not window.apart(shares, still) <= 1.0:
        causes.insert(0, _of_weights(window, shares, still))
    return AccumulationDiffers.fault(
        "\n".join([*what, *(cause.what for cause in causes)]),
        where=window.phase.source,
        why="\n".join(f"{rank}. {cause.why}" for rank, cause in enumerate(causes, 1)),
        fix="\n".join(dict.fromkeys(cause.fix for cause in causes)),
        names=[name for cause in causes for name in cause.names] or apart,
    )


def few(values: Sequence[Any], most: int = 6) -> str:
    """The first of some values, and how many more there are."""
    shown = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values[:most]]
    return ", ".join(shown) + (f" and {len(values) - most} more" if len(values) > most else "")


def _unsteady(model: nn.Module) -> list[_Group]:
    """Batch normalisation and random masks, in train mode."""
    active = {name or "(model)": module for name, module in model.named_modules() if module.training}
    norms = {name: module for name, module in active.items() if "BatchNorm" in type(module).__name__}
    masks = {name: module for name, module in active.items() if name not in norms and _draws_masks(module)}
    groups = [
        _Group(
            norms,
            "batch normalisation takes mean and variance of each micro-batch, not of the whole batch",
            "use GroupNorm or LayerNorm, or put the batch normalisation into eval mode; or accept the small statistics "
            "with `audit.accept: {SL613: [...]}`",
        ),
        _Group(
            masks,
            "dropout draws other masks for micro-batches than for one big batch: equal on average only",
            "nothing to mend: accept it with `audit.accept: {SL613: [...]}`",
        ),
    ]
    return [group for group in groups if group.modules]


def _draws_masks(module: nn.Module) -> bool:
    if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
        return bool(module.dropout > 0)
    kind = type(module).__name__.lower()
    if not any(word in kind for word in ("dropout", "droppath", "stochasticdepth")):
        return False
    return getattr(module, "p", 1.0) != 0.0


def _of_modules(window: Window, group: _Group, shares: Sequence[float]) -> _Cause:
    left = window.apart(shares, list(group.modules.values()))
    says = "equal" if left <= 1.0 else f"{left:.2g} times the tolerance apart"
    listed = few([f"`{name}` ({type(module).__name__})" for name, module in group.modules.items()])
    return _Cause(f"with {listed} in eval mode: {says}", group.why, group.fix, tuple(group.modules), left)


def _of_weights(window: Window, shares: Sequence[float], still: Sequence[nn.Module]) -> _Cause:
    """Which weights of the micro-batches give the big batch's gradient, if any do."""
    full = _entries(window.full(still))
    if window.draws:
        return _Cause(
            "the loss function draws random numbers",
            "the loss function draws random numbers itself: others for micro-batches than for one big batch",
            "nothing to mend where the randomness is meant: accept it with `audit.accept: {SL613: ['*']}`",
        )
    each = torch.stack([_entries(window.alone(batch, still)) for batch in window.batches])
    bound = _SLACK * max(window.tolerances.values()) * max(float(full.norm()), torch.finfo(full.dtype).tiny)
    for candidate in _candidates(window):
        weights = torch.tensor(candidate.weights, dtype=full.dtype)
        if float((weights @ each - full).norm()) <= bound:
            return _Cause(_weighs(candidate.weights, shares), candidate.why, candidate.fix)
    fitted = torch.linalg.lstsq(each.T, full.unsqueeze(1), driver="gelsd").solution.squeeze(1)
    if float((fitted @ each - full).norm()) <= bound and len(full) > len(each):
        return _Cause(
            _weighs(fitted.tolist(), shares),
            "the loss averages over something else than the run weighs by",
            "override `count_tokens(self, batch)` to count what the loss averages over, and set "
            "`accumulate.weight_by: tokens`",
        )
    return _Cause(
        "no weights of the micro-batches give the gradient of one big batch",
        "the loss, or a layer, lets samples act on each other: contrastive pairs, statistics of the batch",
        "compute it for each sample alone, or train with the whole batch at once",
    )


def _weighs(weights: Sequence[float], shares: Sequence[float]) -> str:
    return f"one big batch weighs the micro-batches {few(weights)}; the run weighs them {few(shares)}"


def _candidates(window: Window) -> Iterator[_Weighting]:
    given, batches = window.given, window.batches
    fix = "set `accumulate.weight_by: {}`" + f" (now `{given.config.accumulate.weight_by}`)"
    yield _Weighting(
        (1.0,) * len(batches),
        "the loss is a sum over the samples (`reduction='sum'`): it grows with the size of the batch",
        "use `reduction='mean'`, or divide the loss by what it sums over",
    )
    counts = {"samples": given.count, "batches": lambda batch: 1, "tokens": given.count_tokens}
    for name, count in counts.items():
        if count is not None and (parts := _parts([count(batch) for batch in batches])):
            yield _Weighting(parts, f"the loss is a mean over {name}", fix.format(name))
    for path, what, numbers in _countable(batches):
        if parts := _parts(numbers):
            yield _Weighting(
                parts,
                f"the loss is a mean over {what} of `{path}`: {few(numbers)} in the micro-batches",
                f"override `count_tokens(self, batch)` to count {what} of `{path}`, and {fix.format('tokens')}",
            )


def _countable(batches: Sequence[Any]) -> Iterator[tuple[str, str, list[float]]]:
    """What a loss may average over: path, in words, and how many of it each micro-batch has."""
    for column in zip(*(list(tensors(batch)) for batch in batches), strict=False):
        path, values = column[0][0], [tensor for _, tensor in column]
        yield path, "the values", [tensor.numel() for tensor in values]
        if values[0].dtype is torch.bool or not values[0].is_complex():
            yield path, "the values that are not 0", [int((tensor != 0).sum()) for tensor in values]
        for ignored in _IGNORED if not values[0].is_floating_point() else ():
            yield path, f"the labels that are not {ignored}", [int((tensor != ignored).sum()) for tensor in values]


def _parts(numbers: Sequence[float]) -> tuple[float, ...]:
    total = sum(numbers)
    return tuple(number / total for number in numbers) if total else ()


def _entries(gradients: Gradients) -> Tensor:
    """Some entries of all gradients, float64 on the CPU; of complex ones both parts."""
    every = [t for own in gradients.values() for t in own]
    step = max(1, sum(tensor.numel() for tensor in every) // _MAX_ENTRIES)
    real = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in every]
    return torch.cat([tensor.reshape(-1)[::step].cpu().double() for tensor in real])
