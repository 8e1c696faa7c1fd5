"""The training step a second time, as simple as it can be written: nothing is fused, cached, confined or deferred.

One gradient per loss term by `torch.autograd.grad` over a retained graph, then a plain sum, a norm written out by hand,
torch's plain optimizers, and schedules that move once a step. It is slow, and it shares no line with safeloop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class Owner(NamedTuple):
    """An optimizer, what it updates, its clipping and its schedule."""

    optimizer: Optimizer
    max_norm: float | None = None
    clip_value: float | None = None
    agc: tuple[float, float] | None = None
    """largest ratio of a unit's gradient to its weights, smallest norm of weights that counts"""
    scheduler: LRScheduler | None = None

    @property
    def parameters(self) -> list[Tensor]:
        return [tensor for group in self.optimizer.param_groups for tensor in group["params"]]

    @property
    def rates(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]


class Phase(NamedTuple):
    """A loss function, the names of the owners that it trains, and when it runs."""

    losses: Callable[[Any], Mapping[str, Any]]
    trains: Sequence[str]
    repeat: int = 1
    every: int = 1


class Step(NamedTuple):
    """What one finished step measured: terms, norms before clipping, learning rates after it, turns that it skipped."""

    losses: dict[str, float]
    norms: dict[str, float]
    rates: dict[str, list[float]]
    num_skipped: int


class Job(NamedTuple):
    """Everything that a run is."""

    owners: Mapping[str, Owner]
    phases: Sequence[Phase]
    weights: Mapping[str, Callable[[int], float]]
    """term -> its weight on a step; 1 where nothing is said"""
    data: Sequence[Any]
    max_steps: int | None = None
    max_epochs: int | None = None
    term_every: Mapping[str, int] = {}
    """term -> it counts on the steps that this divides"""
    micro_batches: int = 1
    measure: Callable[[Any], float] = lambda batch: 1.0
    """what a micro-batch counts by in its window"""
    skips_nonfinite: bool = False
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext


def train(job: Job) -> list[Step]:
    """Train until steps or data end; a step that the data does not suffice for is not begun."""
    windows = cut_into_windows(job.data, job.micro_batches, job.max_epochs)
    steps: list[Step] = []
    while job.max_steps is None or len(steps) < job.max_steps:
        number = len(steps)
        needed = sum(phase.repeat for phase in job.phases if number % phase.every == 0)
        drawn = list(islice(windows, needed))
        if len(drawn) < needed:
            break
        steps.append(one_step(job, iter(drawn), number))
    return steps


def cut_into_windows(data: Sequence[Any], size: int, max_epochs: int | None) -> Iterator[Sequence[Any]]:
    """Runs of `size` micro-batches; the last of an epoch is shorter."""
    epoch = 0
    while max_epochs is None or epoch < max_epochs:
        for start in range(0, len(data), size):
            yield data[start : start + size]
        epoch += 1


def one_step(job: Job, windows: Iterator[Sequence[Any]], number: int) -> Step:
    """Each due phase in order, each turn on a fresh window, then each schedule whose owner was updated."""
    losses: dict[str, float] = {}
    norms: dict[str, float] = {}
    updated: set[str] = set()
    num_skipped = 0
    for phase in job.phases:
        if number % phase.every != 0:
            continue
        for _ in range(phase.repeat):
            window = next(windows)
            turn_losses = put_gradients(job, phase, window, number)
            turn_norms = {name: norm_of(job.owners[name]) for name in phase.trains}
            losses.update(turn_losses)
            norms.update({name: norm for name, norm in turn_norms.items() if norm is not None})
            measured = [*turn_losses.values(), *(norm for norm in turn_norms.values() if norm is not None)]
            if not all(map(math.isfinite, measured)):
                assert job.skips_nonfinite, "a number is not finite"
                num_skipped += 1
                continue
            for name in phase.trains:
                if turn_norms[name] is None:  # nothing reaches it: it is not updated, and its schedule stands still
                    continue
                clip(job.owners[name], turn_norms[name])
                job.owners[name].optimizer.step()
                updated.add(name)
    for name, owner in job.owners.items():
        if name in updated and owner.scheduler is not None:
            owner.scheduler.step()
    return Step(losses, norms, {name: owner.rates for name, owner in job.owners.items()}, num_skipped)


def put_gradients(job: Job, phase: Phase, window: Sequence[Any], number: int) -> dict[str, float]:
    """Give the trained parameters the gradient of the weighted terms over the window; what took no part has None."""
    trained = [tensor for name in phase.trains for tensor in job.owners[name].parameters]
    counts = [job.measure(batch) for batch in window]
    sums: list[Tensor | None] = [None] * len(trained)
    values: dict[str, float] = {}
    for batch, count in zip(window, counts, strict=True):
        share = count / sum(counts) if sum(counts) else 1 / len(counts)
        with job.autocast():
            terms = phase.losses(batch)
        for name, term in terms.items():
            if number % job.term_every.get(name, 1) != 0:
                continue
            term = term() if callable(term) else term
            value = (term[0] * term[1]).sum() if isinstance(term, tuple) else term
            values[name] = values.get(name, 0.0) + share * value.item()
            if not value.requires_grad:
                continue
            weight = job.weights[name](number) if name in job.weights else 1.0
            part = share * weight * value
            gradients = torch.autograd.grad(part, trained, retain_graph=True, allow_unused=True)
            sums = [a if b is None else b if a is None else a + b for a, b in zip(sums, gradients, strict=True)]
    for tensor, gradient in zip(trained, sums, strict=True):
        tensor.grad = gradient
    return values


def norm_of(owner: Owner) -> float | None:
    """The root of the sum of the squares of all entries; None without a gradient."""
    gradients = [tensor.grad for tensor in owner.parameters if tensor.grad is not None]
    if not gradients:
        return None
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))


def clip(owner: Owner, norm: float | None) -> None:
    """By the norm of all (with the 1e-6 of torch's own function), by value, or unit by unit."""
    for tensor in owner.parameters:
        if tensor.grad is None:
            continue
        if owner.max_norm is not None and norm is not None:
            tensor.grad = tensor.grad * min(1.0, owner.max_norm / (norm + 1e-6))
        if owner.clip_value is not None:
            tensor.grad = tensor.grad.clamp(-owner.clip_value, owner.clip_value)
        if owner.agc is not None:
            tensor.grad = adaptive(tensor.grad, tensor.detach(), *owner.agc)


def adaptive(gradient: Tensor, weight: Tensor, ratio: float, eps: float) -> Tensor:
    """Rows of a matrix and whole vectors, each at most `ratio` times the norm of its weights."""
    if gradient.dim() > 1:
        return torch.stack(
            [adaptive(g.flatten(), w.flatten(), ratio, eps) for g, w in zip(gradient, weight, strict=True)]
        )
    most, norm = ratio * max(float(weight.norm()), eps), float(gradient.norm())
    return gradient * (most / norm) if norm > most else gradient
