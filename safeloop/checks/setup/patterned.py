"""Whether a weight's values follow a pattern, as constants, identities and sinusoids do, or look drawn at random."""

from __future__ import annotations

import torch
from torch import Tensor

_LOOKED_AT = 1 << 16
"""entries; more of them tell nothing new"""
_FORESEEN = 0.25
"""share of the variation that a recurrence of second order may leave unexplained; random values leave about all"""
_LONG = 6
"""a line of fewer entries may follow a recurrence by chance"""


@torch.no_grad()
def is_patterned(weight: Tensor) -> bool:
    """Whether few of the values differ, or the lines along some axis follow `x[i+1] + x[i-1] = c x[i]`.

    That recurrence holds for constants, ramps, exponentials and sinusoids, each line with a `c` of its own: position
    tables, Fourier bases, `arange`. At random values of variance 1 it leaves a variance of about 2.
    """
    values = weight.detach().double()
    while values.numel() > _LOOKED_AT and values.shape[0] > _LONG:
        values = values[: max(_LONG, values.shape[0] // 2)]
    if not bool(torch.isfinite(values).all()) or torch.unique(values).numel() <= values.numel() // 2:
        return True
    return any(values.shape[axis] >= _LONG and _is_foreseen(values.movedim(axis, -1)) for axis in range(values.dim()))


def _is_foreseen(lines: Tensor) -> bool:
    inner, around = lines[..., 1:-1], lines[..., 2:] + lines[..., :-2]
    slope = (inner * around).sum(-1, keepdim=True) / inner.square().sum(-1, keepdim=True).clamp_min(1e-30)
    left = (around - slope * inner).square().sum()
    return bool(left <= _FORESEEN * around.square().sum())
