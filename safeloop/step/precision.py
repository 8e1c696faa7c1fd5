"""Number formats: autocast around each forward, and a gradient scale for fp16."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

from safeloop.autograd.norms import values

Format = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class GradientScale:
    """The factor that keeps small fp16 gradients from vanishing: one for all optimizers, adapted once a step.

    The rule and the numbers are those of `torch.amp.GradScaler`: halved after an overflow, doubled after 2000 steps
    without one. That class counts one update per optimizer and step, so that a phase that repeats could not use it.
    """

    def __init__(self, device: torch.device, initial: float = 2.0**16, interval: int = 2000) -> None:
        self.value = torch.full((), initial, dtype=torch.float32, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)
        self._found_inf = torch.zeros((), dtype=torch.float32, device=device)
        self._interval = interval
        self._is_used = False

    def scaled(self, seeds: Sequence[Tensor]) -> list[Tensor]:
        """Seeds of a backward pass, times the scale."""
        return [seed * self.value.to(seed.dtype) for seed in seeds]

    def unscale(self, gradients: Sequence[Tensor]) -> None:
        """Divide gradients by the scale in place; an overflow among them is remembered until `adapt`."""
        inverse = self.value.double().reciprocal().float()
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for gradient in gradients:
            kinds.setdefault((gradient.device, gradient.dtype), []).append(values(gradient))
        for (device, _), alike in kinds.items():
            found_inf = self._found_inf.to(device)
            torch._amp_foreach_non_finite_check_and_unscale_(alike, found_inf, inverse.to(device))
            self._found_inf = torch.maximum(self._found_inf, found_inf.to(self._found_inf.device))
        self._is_used = self._is_used or bool(kinds)

    def adapt(self) -> None:
        """Once a step, after all updates: lower or raise the scale."""
        if self._is_used:
            torch._amp_update_scale_(self.value, self._good_steps, self._found_inf, 2.0, 0.5, self._interval)
            self._found_inf.zero_()
            self._is_used = False


class Precision:
    """How a run computes.

    Autocast is opened for each forward alone: a region around a loop would serve weights as they were before the
    update.
    """

    def __init__(self, number_format: Format, device: torch.device) -> None:
        self.format = number_format
        self._device = device.type
        self.scale = GradientScale(device) if number_format == "fp16" else None

    def autocast(self) -> AbstractContextManager[object]:
        """A region for one forward."""
        dtype = _DTYPES.get(self.format)
        return nullcontext() if dtype is None else torch.autocast(self._device, dtype)
