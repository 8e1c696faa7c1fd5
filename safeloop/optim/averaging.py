"""Averaged weights beside the live ones: exponential (EMA) or equal (SWA), by torch's `AveragedModel`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from safeloop.checks.update.average import ModelCannotBeCopied, NonFiniteWeights
from safeloop.component import Component, Float, Int
from safeloop.signatures import union

Tensors = tuple[Tensor, ...] | list[Tensor]
Rule = Callable[[Tensors, Tensors, int], None]


class AverageSpec(Component):
    """An average of the weights over steps."""

    type: str

    def is_due(self, num_steps: int) -> bool:
        """Whether the weights after so many steps are averaged in."""
        raise NotImplementedError

    def merge(self, averaged: Tensors, live: Tensors, num_averaged: int) -> None:
        """Average `live` into `averaged`, in place; `num_averaged` weights, at least one, are in it already."""
        raise NotImplementedError


class EmaSpec(AverageSpec):
    """Exponential moving average: `average = decay * average + (1 - decay) * weights` after each step."""

    type: Literal["ema"] = "ema"
    decay: Float = Field(default=0.999, ge=0, lt=1)
    """how much of the average each step keeps; it looks back about 1 / (1 - decay) steps"""
    warmup: Int | None = Field(default=None, ge=1)
    """with w, the decay is at most (1 + n) / (w + n) after n averaged steps, to forget the start; usual: 10"""

    def __str__(self) -> str:
        return f"ema, decay {self.decay:g}" + ("" if self.warmup is None else f", warm-up {self.warmup}")

    def is_due(self, num_steps: int) -> bool:
        return True

    def decay_at(self, num_averaged: int) -> float:
        """The decay after so many averaged steps."""
        ramp = 1.0 if self.warmup is None else (1 + num_averaged) / (self.warmup + num_averaged)
        return min(self.decay, ramp)

    def merge(self, averaged: Tensors, live: Tensors, num_averaged: int) -> None:
        rule: Rule = get_ema_multi_avg_fn(self.decay_at(num_averaged))  # type: ignore[no-untyped-call]
        rule(averaged, live, num_averaged)


class SwaSpec(AverageSpec):
    """Stochastic weight averaging: the mean of the weights after steps `start`, `start + every`, ..."""

    type: Literal["swa"] = "swa"
    start: Int = Field(ge=1)
    """first step whose weights count, counted from 1"""
    every: Int = Field(default=1, ge=1)
    """steps between two weights that count"""

    def __str__(self) -> str:
        return f"swa from step {self.start}" + ("" if self.every == 1 else f", every {self.every} steps")

    def is_due(self, num_steps: int) -> bool:
        return num_steps >= self.start and (num_steps - self.start) % self.every == 0

    def merge(self, averaged: Tensors, live: Tensors, num_averaged: int) -> None:
        rule: Rule = get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]
        rule(averaged, live, num_averaged)


if TYPE_CHECKING:
    AnyAverage = AverageSpec
else:
    AnyAverage = union({"ema": EmaSpec, "swa": SwaSpec})


class Average:
    """A copy of the model whose weights are an average over steps.

    The running means and variances of normalisation layers are averaged as the weights are, which needs no further pass
    over the data; every other buffer is a copy of the live one. Costs a copy of the model, and a pass over its weights
    for each update.

    Source:
        Averaging: B. T. Polyak, A. B. Juditsky: Acceleration of Stochastic Approximation by Averaging (1992);
        torchvision's reference training averages the buffers too. Warm-up: TensorFlow's ExponentialMovingAverage,
        `num_updates`. SWA: Pavel Izmailov et al.: Averaging Weights Leads to Wider Optima and Better Generalization
        (arXiv 1803.05407, 2018); there the statistics are computed anew in a pass over the data.
    """

    def __init__(self, spec: AverageSpec, model: nn.Module) -> None:
        self.spec = spec
        self.num_averaged = 0
        try:
            self._copy = AveragedModel(model, multi_avg_fn=self._merge)
        except Exception as error:
            raise ModelCannotBeCopied.error(
                f"`copy.deepcopy` of the model fails: {type(error).__name__}: {error}",
                where="average",
                fix="keep what cannot be copied (open files, locks, non-leaf tensors) out of the model, or give its "
                "class `__deepcopy__`; or take out the section `average`",
            ) from error
        self._copy.requires_grad_(False)
        for parameter in self._copy.parameters():
            parameter.grad = None

    @property
    def model(self) -> nn.Module:
        """The model with the averaged weights; those of the start while `num_averaged` is 0."""
        model: nn.Module = self._copy.module
        return model

    def update(self, model: nn.Module, num_steps: int) -> None:
        """Average in the live weights after so many steps, where they are due.

        Raises:
            FaultError: SL605, a weight or a running statistic is not finite; the average is left as it was.
        """
        if not self.spec.is_due(num_steps):
            return
        _refuse_non_finite(model, num_steps)
        before = [statistic.clone() for statistic in _statistics(self.model)]
        self._copy.update_parameters(model)
        if self.num_averaged and before:
            now = list(_statistics(self.model))  # torch has copied the live ones
            self.spec.merge(before, now, self.num_averaged)
            torch._foreach_copy_(now, before)
        self.num_averaged += 1

    def _merge(self, averaged: Tensors, live: Tensors, _: object) -> None:
        self.spec.merge(averaged, live, self.num_averaged)


def _statistics(model: nn.Module) -> Iterator[Tensor]:
    """The running means and variances of normalisation layers."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            assert module.running_var is not None
            yield from (module.running_mean, module.running_var)


def _refuse_non_finite(model: nn.Module, num_steps: int) -> None:
    tensors = [*model.parameters(), *_statistics(model)]
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor.detach())
    norms = [torch.stack(torch._foreach_norm(alike)) for alike in kinds.values() if alike[0].is_floating_point()]
    if all(bool(norm.isfinite().all()) for norm in norms):
        return
    watched = {id(tensor) for tensor in tensors}
    named = [*model.named_parameters(), *model.named_buffers()]
    if bad := [name for name, tensor in named if id(tensor) in watched and not bool(tensor.isfinite().all())]:
        raise NonFiniteWeights.error(
            f"{len(bad)} of {len(tensors)} tensors hold NaN or infinity (first: `{bad[0]}`)",
            where=f"after step {num_steps}",
            why="the gradients were finite: the update overflowed, or a skipped batch reached running statistics",
            fix="lower the learning rate; where it is a running statistic, keep the bad batch out of the data",
        )
