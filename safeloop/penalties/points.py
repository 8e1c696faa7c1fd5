"""Where penalties are taken: leaves that share the loss's forward, and points between two batches."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from safeloop.checks.penalties.point import PenaltyOfWrongShape


def leaf(x: object) -> Tensor:
    """`x` as a leaf that requires grad, of the same numbers; as it is where it requires grad already.

    Raises:
        FaultError: SL432, it is no tensor of floating-point numbers.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = str(x.dtype).removeprefix("torch.") if isinstance(x, Tensor) else type(x).__name__
        raise PenaltyOfWrongShape.error(
            f"a leaf was asked of a value of kind {kind}",
            where="self.leaf",
            why="only floating-point tensors have gradients",
            fix="make a leaf of the inputs after they were converted: `self.leaf(images.float())`",
        )
    return x if x.requires_grad else x.detach().requires_grad_()


def interpolate(real: Tensor, fake: Tensor) -> Tensor:
    """Points drawn uniformly between paired samples: `e real + (1 - e) fake`, one `e` in 0..1 for each sample.

    Args:
        real: `[N, ...]`.
        fake: of the same shape; its dtype becomes that of `real`.

    Returns:
        `[N, ...]` without a graph. Draws N numbers from torch's generator of the device.

    Raises:
        FaultError: SL432, the shapes differ.

    Source: Ishaan Gulrajani et al.: Improved Training of Wasserstein GANs (arXiv 1704.00028, 2017), algorithm 1.
    """
    if real.shape != fake.shape or real.dim() == 0:
        raise PenaltyOfWrongShape.error(
            f"real samples have shape {list(real.shape)}, generated ones {list(fake.shape)}",
            where="sl.interpolate",
            why="each real sample is paired with one generated sample",
            fix="generate as many as there are real ones: `torch.randn(len(real), ...)`",
        )
    share = torch.rand(len(real), *[1] * (real.dim() - 1), device=real.device, dtype=_drawn(real))
    return torch.lerp(fake.detach().to(share.dtype), real.detach().to(share.dtype), share).to(real.dtype)


def _drawn(real: Tensor) -> torch.dtype:
    return torch.promote_types(real.dtype, torch.float32)


def is_due(step: int, every: Iterable[int]) -> bool:
    """Whether something that is due every so many steps is due on this one, counted from 0."""
    return any(step % one == 0 for one in every)
