"""A refused batch leaves no trace in running statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import safeloop as sl
from safeloop.step import DeferredGate
from safeloop.step.buffers import BufferKeeper

OFF: dict[str, Any] = {"sinks": []}


class Fit(sl.Trainer):
    def loss(self, batch: Tensor) -> Tensor:
        return (self.model(batch) - 1).square().mean()


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def batches(poisoned: int | None = None, n: int = 6) -> list[Tensor]:
    data = list(torch.randn(n, 8, 3, generator=torch.Generator().manual_seed(1)))
    if poisoned is not None:
        data[poisoned] = data[poisoned] * float("nan")
    return data


def fit(net: nn.Module, data: list[Tensor], **sections: Any) -> sl.RunResult:
    sections = {"optimizers": {"type": "Adam", "lr": 0.1}, "run": {"max_steps": len(data)}, "log": OFF, **sections}
    return Fit(model=net, data=data, **sections).fit()


def same(net: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, net.state_dict().values(), other.state_dict().values()))


def test_a_skipped_batch_is_as_if_it_had_never_been_there() -> None:
    ours, plain = make_net(), make_net()
    data = batches(poisoned=2)
    fit(ours, data, nonfinite={"policy": "skip", "max_consecutive": 1})
    fit(plain, data[:2] + data[3:])
    assert same(ours, plain)


@pytest.mark.parametrize("poisoned", [0, 3, 5])
def test_a_batch_that_stops_the_run_leaves_the_state_of_before_it(poisoned: int) -> None:
    ours, plain = make_net(), make_net()
    with pytest.raises(sl.FaultError):
        fit(ours, batches(poisoned))
    if poisoned:
        fit(plain, batches()[:poisoned])
    assert same(ours, plain)


@pytest.mark.parametrize("poisoned", [3, 5])
def test_the_same_where_the_check_is_read_one_step_later(monkeypatch: pytest.MonkeyPatch, poisoned: int) -> None:
    def deferred(config: Any, owners: Any, device: torch.device, precision: Any) -> DeferredGate:
        return DeferredGate(owners.values(), device)

    ours, plain = make_net(), make_net()
    fit(plain, batches()[:poisoned])
    monkeypatch.setattr("safeloop.assembly._gate", deferred)
    with pytest.raises(sl.FaultError):
        fit(ours, batches(poisoned))
    assert same(ours, plain)


def test_what_was_not_written_is_not_copied_again() -> None:
    net = make_net()
    net.register_buffer("mask", torch.ones(4))
    keeper = BufferKeeper(net, depth=1)
    kept = keeper._copies[0][0]
    assert kept.tolist() == [1.0] * 4
    version = kept._version
    for _ in range(3):
        keeper.keep()
    assert kept._version == version
    net.mask.mul_(0)
    keeper.keep()
    net.mask.fill_(7)
    keeper.restore()
    assert net.mask.tolist() == [0.0] * 4


def test_a_healthy_run_has_the_same_bits_with_and_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, plain = make_net(), make_net()
    fit(ours, batches())
    monkeypatch.setattr(BufferKeeper, "keep", lambda self: None)
    fit(plain, batches())
    assert same(ours, plain)


class ByHand(sl.Trainer):
    """Two updates in a step, each on a batch of its own."""

    def custom_step(self, ops: Any, batch: Tensor) -> None:
        for one in (batch, ops.draw()):
            ops.zero()
            ops.backward({"value": (self.model(one) - 1).square().mean()})
            ops.update()


def by_hand(net: nn.Module, data: list[Tensor], **sections: Any) -> sl.RunResult:
    run = {"max_steps": len(data) // 2}
    optimizer = {"type": "Adam", "lr": 0.1}
    return ByHand(model=net, data=data, optimizers=optimizer, run=run, log=OFF, **sections).fit()


def statistics(net: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in net.buffers()]


@pytest.mark.parametrize("poisoned", [2, 3])
def test_a_custom_step_that_is_refused_leaves_no_trace_in_running_statistics(poisoned: int) -> None:
    ours, plain = make_net(), make_net()
    with pytest.raises(sl.FaultError, match=r"SL405|SL501"):
        by_hand(ours, batches(poisoned))
    by_hand(plain, batches()[:2])
    assert all(map(torch.equal, statistics(ours), statistics(plain))), "as they were when the step began"


@pytest.mark.parametrize("poisoned", [2, 3])
def test_a_custom_step_whose_update_is_skipped_keeps_its_statistics_finite(poisoned: int) -> None:
    net = make_net()
    result = by_hand(net, batches(poisoned), nonfinite={"policy": "skip", "max_consecutive": 1})
    assert result.steps == 3
    assert all(bool(buffer.isfinite().all()) for buffer in net.buffers())


@pytest.mark.parametrize("poisoned", [2, 3, 4, 5])
def test_the_same_in_a_custom_step_where_the_check_is_read_later(monkeypatch: Any, poisoned: int) -> None:
    def deferred(config: Any, owners: Any, device: torch.device, precision: Any) -> DeferredGate:
        return DeferredGate(owners.values(), device)

    net, plain = make_net(), make_net()
    by_hand(plain, batches()[: poisoned // 2 * 2])
    monkeypatch.setattr("safeloop.assembly._gate", deferred)
    with pytest.raises(sl.FaultError):
        by_hand(net, batches(poisoned))
    assert all(map(torch.equal, statistics(net), statistics(plain))), "as when the step of that update began"


def test_planning_a_custom_step_leaves_the_buffers_as_they_were() -> None:
    net = make_net()
    before = statistics(net)
    data = batches(poisoned=0)
    run = ByHand(model=net, data=data, optimizers={"type": "Adam", "lr": 0.1}, run={"max_steps": 1}, log=OFF)
    with pytest.raises(sl.FaultError):
        run.plan()
    assert all(map(torch.equal, before, statistics(net)))
