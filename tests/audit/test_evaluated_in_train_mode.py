"""Evaluations with active dropout by somebody who never calls `eval()`, and what only looks like one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import safeloop as sl

Extra = Callable[[nn.Module, Tensor, Tensor, int], Any]
"""What an iteration does after its update, with the model, its batch, and its number."""


class Functional(nn.Module):
    """Dropout as a function that follows the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(self.first(x).relu(), 0.4, training=self.training))


class Recurrent(nn.Module):
    """Dropout between two layers of an LSTM only."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.last = nn.LSTM(2, 8, num_layers=2, dropout=0.3, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rnn(x.view(-1, 3, 2))[0][:, -1])


class Attentive(nn.Module):
    """Dropout of attention weights only."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(2, 2, dropout=0.3, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 3, 2)
        return self.last(self.attention(x, x, x)[0].flatten(1))


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, 3))


def data(n: int = 12) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 6)
    return x, x[:, :3].argmax(1)


def watched(extra: Extra, make: Callable[[], nn.Module] = plain, steps: int = 6) -> list[Any]:
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for step in range(steps):
            x, y = data()
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            extra(model, x, y, step)
            audit.step()
    return list(audit.faults)


@torch.no_grad()
def by_loss(model: nn.Module, *_: Any) -> float:
    x, y = data()
    return F.cross_entropy(model(x), y).item()


@torch.no_grad()
def by_accuracy(model: nn.Module, *_: Any) -> float:
    x, y = data()
    return (model(x).argmax(1) == y).float().mean().item()


def once_over_several_batches(model: nn.Module, x: Tensor, y: Tensor, step: int) -> None:
    if step == 4:
        with torch.inference_mode():
            batches = [data() for _ in range(3)]
            sum((model(x).argmax(1).eq(y)).sum() for x, y in batches)


@pytest.mark.parametrize("make", [plain, Functional, Recurrent, Attentive])
@pytest.mark.parametrize("extra", [by_loss, by_accuracy, once_over_several_batches])
def test_an_evaluation_without_eval(extra: Extra, make: Callable[[], nn.Module]) -> None:
    """By a loss, an accuracy, or once at the end of an epoch: told once, with the modules and the line."""
    faults = watched(extra, make)
    assert [fault.code for fault in faults] == ["SL709"]
    assert "test_evaluated_in_train_mode.py" in faults[0].where
    assert faults[0].names


def test_a_model_that_is_called_in_parts() -> None:
    """Encoder and head, each called by the loop: still one evaluation a batch."""

    def extra(model: Any, *_: Any) -> None:
        x, y = data()
        with torch.no_grad():
            F.cross_entropy(model[1](model[0](x)), y)

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.4)), nn.Sequential(nn.Dropout(0.1), nn.Linear(16, 3))
        )

    assert [fault.code for fault in watched(extra, make)] == ["SL709"]


def properly(model: nn.Module, *_: Any) -> None:
    model.eval()
    by_loss(model)
    model.train()


def monte_carlo(model: nn.Module, *_: Any) -> None:
    x, y = data()
    with torch.no_grad():
        votes = [model(x).argmax(1) == y for _ in range(5)]
    torch.stack(votes).float().mean(0)


def monte_carlo_mean(model: nn.Module, *_: Any) -> None:
    x, y = data()
    with torch.no_grad():
        mean = torch.stack([model(x.clone()).softmax(1) for _ in range(5)]).mean(0)
        F.nll_loss(mean.log(), y)


def loss_after_the_update(model: nn.Module, x: Tensor, y: Tensor, step: int) -> None:
    with torch.no_grad():
        F.cross_entropy(model(x), y)


def loss_of_a_view(model: nn.Module, x: Tensor, y: Tensor, step: int) -> None:
    with torch.no_grad():
        F.cross_entropy(model(x[:6]), y[:6])


def loss_after_other_passes(model: nn.Module, x: Tensor, y: Tensor, step: int) -> None:
    with torch.no_grad():
        model(data()[0])
        F.cross_entropy(model(x), y)


def hard_samples(model: nn.Module, *_: Any) -> None:
    x, y = data(24)
    with torch.no_grad():
        hardest = F.cross_entropy(model(x), y, reduction="none").topk(8).indices
    F.cross_entropy(model(x[hardest]), y[hardest]).backward()
    model.zero_grad()


def eval_now_and_then(model: nn.Module, x: Tensor, y: Tensor, step: int) -> None:
    if step == 0:
        properly(model)
    else:
        by_loss(model)


def no_comparison(model: nn.Module, *_: Any) -> None:
    with torch.no_grad():
        model(data()[0]).argmax(1).tolist()


LOOK_ALIKES = [
    *(properly, monte_carlo, monte_carlo_mean, loss_after_the_update, loss_of_a_view, hard_samples),
    loss_after_other_passes,
    *(eval_now_and_then, no_comparison),
]


@pytest.mark.parametrize("extra", LOOK_ALIKES)
def test_what_only_looks_like_it(extra: Extra) -> None:
    """Proper evaluations, Monte Carlo dropout, the loss after an update, chosen samples, actions."""
    assert "SL709" not in [fault.code for fault in watched(extra)]


def test_without_dropout_nothing_is_wrong() -> None:
    """A model without dropout, or with one that drops nothing, gives the same in both modes."""
    assert not watched(by_loss, lambda: nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.0), nn.Linear(16, 3)))


def test_batch_normalisation_is_told_by_its_own_code() -> None:
    """One cause, one fault: the running statistics say it already."""
    found = watched(
        by_loss, lambda: nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.4), nn.Linear(16, 3))
    )
    assert [fault.code for fault in found] == ["SL702"]


def test_a_search_without_gradients() -> None:
    """Who trains by losses alone, without a backward pass, wants the loss of train mode."""
    torch.manual_seed(0)
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(6):
            by_loss(model)
            audit.step()
    assert "SL709" not in [fault.code for fault in audit.faults]
