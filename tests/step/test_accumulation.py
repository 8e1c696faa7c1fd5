"""Accumulated micro-batches equal one big batch, whatever their sizes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import safeloop as sl

OFF: dict[str, Any] = {"sinks": []}


def make_net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def rows(n: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 4, generator=generator, dtype=dtype), torch.randint(3, (n,), generator=generator)


class Classify(sl.Trainer):
    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.model(x), y)


def train(net: nn.Module, batches: list[Any], *, cls: type[sl.Trainer] = Classify, **sections: Any) -> sl.RunResult:
    sgd = {"type": "SGD", "lr": 0.1, "momentum": 0.9}
    return cls(model=net, data=batches, optimizers=sgd, log=OFF, **sections).fit()


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=9), window=st.integers(1, 5), clip=st.booleans())
def test_a_window_equals_the_full_batch_with_its_shorter_last_window(sizes: list[int], window: int, clip: bool) -> None:
    x, y = rows(sum(sizes))
    micro = list(zip(x.split(sizes), y.split(sizes), strict=True))
    windows = [sizes[i : i + window] for i in range(0, len(sizes), window)]
    full = list(zip(x.split([sum(w) for w in windows]), y.split([sum(w) for w in windows]), strict=True))
    ours, plain = make_net(), make_net()
    spec = {"type": "SGD", "lr": 0.1, "max_norm": 0.05 if clip else None}
    run = {"max_epochs": 2}
    Classify(model=ours, data=micro, optimizers=spec, accumulate={"micro_batches": window}, run=run, log=OFF).fit()
    result = Classify(model=plain, data=full, optimizers=spec, run=run, log=OFF).fit()
    assert result.steps == 2 * len(windows)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-14)


def test_float32_agrees_to_a_millionth() -> None:
    x, y = rows(32, torch.float32)
    sizes = [5, 11, 2, 14]
    micro = list(zip(x.split(sizes), y.split(sizes), strict=True))
    ours, plain = make_net(torch.float32), make_net(torch.float32)
    train(ours, micro, accumulate={"micro_batches": 4}, run={"max_steps": 5})
    train(plain, [(x, y)], run={"max_steps": 5})
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)


def test_tokens_weigh_what_the_user_counts() -> None:
    class Tokens(sl.Trainer):
        def loss(self, batch: Any) -> Tensor:
            x, y = batch
            return F.cross_entropy(self.model(x), y, ignore_index=-1)

        def count_tokens(self, batch: Any) -> int:
            return int((batch[1] != -1).sum())

    x, y = rows(20)
    y[torch.arange(20) % 3 == 0] = -1
    y[:4] = -1
    y[0] = 1
    micro = list(zip(x.split([5, 5, 10]), y.split([5, 5, 10]), strict=True))
    weighting = {"micro_batches": 3, "weight_by": "tokens"}
    ours, plain, by_samples = make_net(), make_net(), make_net()
    train(ours, micro, cls=Tokens, accumulate=weighting, run={"max_steps": 3})
    train(plain, [(x, y)], cls=Tokens, run={"max_steps": 3})
    train(by_samples, micro, cls=Tokens, accumulate={"micro_batches": 3}, run={"max_steps": 3})
    assert all(
        torch.allclose(a, b, rtol=0, atol=1e-14) for a, b in zip(ours.parameters(), plain.parameters(), strict=True)
    )
    assert not torch.allclose(by_samples[0].weight, plain[0].weight, rtol=0, atol=1e-6), "the test can fail"


def test_a_counted_loss_is_logged_for_the_whole_window() -> None:
    x, y = rows(12)
    micro = list(zip(x.split([3, 9]), y.split([3, 9]), strict=True))
    net = make_net()
    expected = F.cross_entropy(copy.deepcopy(net)(x), y).item()
    result = train(net, micro, accumulate={"micro_batches": 2}, run={"max_steps": 1})
    assert result.losses["loss"] == pytest.approx(expected, abs=1e-7)


def test_a_nan_in_the_last_micro_batch_leaves_everything_unchanged() -> None:
    x, y = rows(12)
    x[-1] = torch.nan
    net = make_net()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(sl.FaultError):
        train(
            net, list(zip(x.split(3), y.split(3), strict=True)), accumulate={"micro_batches": 4}, run={"max_steps": 1}
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
