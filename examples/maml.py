"""Learning to learn sinusoids: a few steps on ten points, differentiated through (MAML). See `configs/maml.yaml`.

Run it with `safeloop train configs/maml.yaml`. The inner loop is part of the loss, so the plan is that of any loss:
one backward pass, a finite check, one update.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils.data import TensorDataset

import safeloop as sl


class Sinusoids(TensorDataset):
    """Tasks `y = amplitude sin(x + phase)`: amplitude in 0.1..5, phase in 0..pi, x in -5..5, with the published ranges.

    A sample is one task: support x and y `[shots, 1]`, query x and y `[shots, 1]`.
    """

    def __init__(self, tasks: int, shots: int = 10, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        amplitude = 0.1 + 4.9 * torch.rand(tasks, 1, 1, generator=draw)
        phase = math.pi * torch.rand(tasks, 1, 1, generator=draw)
        support, query = (10 * torch.rand(2, tasks, shots, 1, generator=draw) - 5).unbind()
        super().__init__(support, amplitude * torch.sin(support + phase), query, amplitude * torch.sin(query + phase))


class Regressor(nn.Sequential):
    """The published net: two hidden layers of 40."""

    def __init__(self, width: int = 40) -> None:
        super().__init__(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))


class Maml(sl.Trainer):
    """Finn, Abbeel, Levine (2017), algorithm 2: one inner step with rate 0.01, and every second derivative."""

    inner_lr = 0.01
    inner_steps = 1

    def query_errors(self, batch: tuple[Tensor, ...], steps: int) -> Tensor:
        """The squared error of each task on its query after `steps` of adaptation to its support, `[N]`.

        Every task gets a copy of the parameters, `[N, ...]`; the sum over tasks has the gradient of each in its row.
        """
        x, y, query_x, query_y = batch

        def error(parameters: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
            return (functional_call(self.model, parameters, (inputs,)) - targets).square().mean()

        start = {name: p.expand(len(x), *p.shape) for name, p in self.model.named_parameters()}
        adapted = sl.autograd.adapt(lambda now: vmap(error)(now, x, y).sum(), start, steps=steps, lr=self.inner_lr)
        return vmap(error)(adapted, query_x, query_y)

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        """The mean over tasks."""
        return self.query_errors(batch, self.inner_steps).mean()

    @sl.needs_grad
    def metrics(self, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The error on new tasks before adaptation and after one step."""
        return {"before": self.query_errors(batch, 0), "after": self.query_errors(batch, 1)}
