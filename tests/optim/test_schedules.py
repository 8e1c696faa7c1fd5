"""Schedules in a Trainer against plain loops that call torch's own: the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler

import safeloop as sl
from safeloop.data.source import open_source
from safeloop.stream import DataEnded, Stream

OFF: dict[str, Any] = {"sinks": []}
WARM_UP = {
    "type": "SequentialLR",
    "milestones": [4],
    "schedulers": [
        {"type": "LinearLR", "start_factor": 0.1, "total_iters": 4},
        {"type": "CosineAnnealingLR", "T_max": 12},
    ],
}


def warm_up(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    parts = [
        lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=4),
        lr_scheduler.CosineAnnealingLR(optimizer, 12),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, [4])


def chain(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.1, 3), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    )


CHAINED = {
    "type": "ChainedScheduler",
    "schedulers": [{"type": "ConstantLR", "factor": 0.1, "total_iters": 3}, {"type": "ExponentialLR", "gamma": 0.9}],
}
SCHEDULES: dict[str, tuple[dict[str, Any], Any]] = {
    "warm-up then cosine": (WARM_UP, warm_up),
    "chained": (CHAINED, chain),
    "step": ({"type": "StepLR", "step_size": 2, "gamma": 0.5}, lambda o: lr_scheduler.StepLR(o, 2, 0.5)),
    "one cycle": (
        {"type": "OneCycleLR", "max_lr": 0.5, "total_steps": 40},
        lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=40),
    ),
}
SGD = {"type": "SGD", "lr": 0.2, "momentum": 0.9}


def make_net() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def batches(n: int = 5) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(n)]


class Classify(sl.Trainer):
    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.model(x), y)


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9, fused=True)


def plain_step(net: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    optimizer.zero_grad()
    F.cross_entropy(net(batch[0]), batch[1]).backward()
    optimizer.step()


def rate(trainer: sl.Trainer, owner: str = "main") -> float:
    return trainer._assembled().owners[owner].optimizer.param_groups[0]["lr"]


class Endless:
    """Can be read again, and nobody knows its length."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        yield from self.items


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_per_step_has_the_bits_of_the_plain_loop(name: str) -> None:
    spec, make = SCHEDULES[name]
    net, plain = make_net(), make_net()
    optimizer = optimizer_of(plain)
    scheduler = make(optimizer)
    for batch in batches() * 4:
        plain_step(plain, optimizer, batch)
        scheduler.step()
    trainer = Classify(model=net, data=batches(), optimizers={**SGD, "scheduler": spec}, run={"max_epochs": 4}, log=OFF)
    trainer.fit()
    assert torch.equal(net.weight, plain.weight)
    assert rate(trainer) == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("data", [list, Endless], ids=["known length", "unknown length"])
def test_a_schedule_per_epoch_has_the_bits_of_the_plain_loop(name: str, data: Any) -> None:
    spec, make = SCHEDULES[name]
    net, plain = make_net(), make_net()
    optimizer = optimizer_of(plain)
    scheduler = make(optimizer)
    rates = []
    for _ in range(7):
        for batch in batches(3):
            plain_step(plain, optimizer, batch)
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    assert len(set(rates)) > 2
    optimizers = {**SGD, "scheduler": {**spec, "per": "epoch"}}
    trainer = Classify(model=net, data=data(batches(3)), optimizers=optimizers, run={"max_epochs": 7}, log=OFF)
    assert trainer.fit().steps == 21
    assert torch.equal(net.weight, plain.weight)
    assert rate(trainer) == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("data", [list, Endless], ids=["known length", "unknown length"])
@pytest.mark.parametrize("size", [2, 5, 9])
def test_windows_of_micro_batches_end_with_their_epoch(data: Any, size: int) -> None:
    rates: list[list[float]] = []

    class Watch(Classify):
        def loss(self, batch: Any) -> Tensor:
            rates.append([self.epoch_of_batch(), rate(self)])
            return super().loss(batch)

        def epoch_of_batch(self) -> int:
            return len(rates) // 5

    halved = {"type": "ExponentialLR", "gamma": 0.5, "per": "epoch"}
    run, accumulate = {"max_epochs": 4}, {"micro_batches": size}
    optimizers = {**SGD, "scheduler": halved}
    Watch(model=make_net(), data=data(batches(5)), optimizers=optimizers, run=run, accumulate=accumulate, log=OFF).fit()
    assert rates == [[epoch, 0.2 * 0.5**epoch] for epoch in range(4) for _ in range(5)]


def test_a_step_that_ends_several_epochs_moves_the_schedule_as_often() -> None:
    class Turns(sl.Trainer):
        @sl.phase(trains="main", repeat=5)
        def many(self, batch: Any) -> dict[str, Tensor]:
            return {"ce": F.cross_entropy(self.model(batch[0]), batch[1])}

    halved = {"type": "ExponentialLR", "gamma": 0.5, "per": "epoch"}
    optimizers = {**SGD, "scheduler": halved}
    trainer = Turns(model=make_net(), data=batches(2), optimizers=optimizers, run={"max_steps": 3}, log=OFF)
    trainer.fit()
    assert rate(trainer) == pytest.approx(0.2 * 0.5**7), "15 micro-batches are seven epochs of 2 and a half"


def test_an_epoch_whose_updates_were_all_skipped_moves_nothing() -> None:
    class Broken(Classify):
        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch) * (torch.nan if self.step in (2, 3, 4) else 1.0)

    data = batches(2)
    optimizers = {**SGD, "scheduler": {"type": "ExponentialLR", "gamma": 0.5, "per": "epoch"}}
    skip = {"policy": "skip", "max_consecutive": 9}
    run = {"max_epochs": 4}
    trainer = Broken(model=make_net(), data=data, optimizers=optimizers, run=run, nonfinite=skip, log=OFF)
    trainer.fit()
    assert rate(trainer) == 0.2 * 0.5**3, "the second of four epochs was skipped whole"


def test_data_of_unknown_length_is_drawn_in_the_same_order_with_a_schedule_per_epoch() -> None:
    seen: list[float] = []

    class Watch(Classify):
        def loss(self, batch: Any) -> Tensor:
            seen.append(batch[0].sum().item())
            return super().loss(batch)

    optimizers = {**SGD, "scheduler": {"type": "ExponentialLR", "gamma": 0.5, "per": "epoch"}}
    run = {"max_epochs": 2}
    result = Watch(model=make_net(), data=Endless(batches(3)), optimizers=optimizers, run=run, log=OFF).fit()
    assert seen == [batch[0].sum().item() for batch in batches(3) * 2]
    assert result.epochs == 2


@pytest.mark.parametrize("data", [list, Endless], ids=["known length", "unknown length"])
def test_the_count_of_epochs_is_right_after_every_draw(data: Any) -> None:
    source = open_source(data([torch.zeros(1)] * 3), batch_size=1, seed=0, shuffle=False)
    stream = Stream(source, lambda batch: batch, len, max_epochs=3)
    counts = [stream.count_epochs()]
    for _ in range(9):
        stream()
        counts.append(stream.count_epochs())
        with suppress(DataEnded):
            stream.peek()
        counts.append(stream.count_epochs())
    assert counts == [0, 0, 0, 0, 0, *[1] * 6, *[2] * 6, 3, 3]
    assert stream.num_samples == 9


class Measured(Classify):
    def metrics(self, batch: Any) -> dict[str, Any]:
        return {"error": F.cross_entropy(self.model(batch[0]), batch[1], reduction="none")}


PLATEAU = {"type": "ReduceLROnPlateau", "factor": 0.5, "patience": 0, "threshold": 0.2, "min_lr": 1e-3}


@pytest.mark.parametrize("metric", ["error", "loss/eval"])
def test_a_plateau_has_the_bits_of_the_plain_loop(metric: str) -> None:
    net, plain = make_net(), make_net()
    optimizer = optimizer_of(plain)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.2, min_lr=1e-3)
    held_out, rates = batches(7)[5:], []
    for step, batch in enumerate(batches() * 4, start=1):
        plain_step(plain, optimizer, batch)
        if step % 3 == 0 or step == 20:
            with torch.no_grad():
                scheduler.step(sum(F.cross_entropy(plain(x), y) for x, y in held_out) / 2)
        rates.append(optimizer.param_groups[0]["lr"])
    assert len(set(rates)) > 2, "the test must reduce something"
    optimizers = {**SGD, "scheduler": {**PLATEAU, "metric": metric}}
    trainer = Measured(
        model=net,
        data=batches(),
        eval_data=held_out,
        optimizers=optimizers,
        evaluate={"every": 3},
        run={"max_epochs": 4},
        log=OFF,
    )
    trainer.fit()
    assert torch.equal(net.weight, plain.weight)
    assert rate(trainer) == optimizer.param_groups[0]["lr"]


def test_two_owners_move_at_their_own_pace() -> None:
    class Two(sl.Trainer):
        def loss(self, batch: Any) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

    optimizers = {
        "weight": {**SGD, "params": ["weight"], "scheduler": {"type": "ExponentialLR", "gamma": 0.5, "per": "epoch"}},
        "bias": {**SGD, "params": "rest", "scheduler": {"type": "ExponentialLR", "gamma": 0.5}},
    }
    trainer = Two(model=make_net(), data=batches(3), optimizers=optimizers, run={"max_epochs": 2}, log=OFF)
    trainer.fit()
    assert (rate(trainer, "weight"), rate(trainer, "bias")) == (0.2 * 0.5**2, pytest.approx(0.2 * 0.5**6))


def test_the_plan_says_when_a_schedule_moves() -> None:
    def plan(**scheduler: Any) -> str:
        optimizers, evaluate = {**SGD, "scheduler": scheduler}, {"every": 1}
        run = {"max_steps": 1}
        trainer = Measured(
            model=make_net(),
            data=batches(),
            eval_data=batches(1),
            optimizers=optimizers,
            evaluate=evaluate,
            run=run,
            log=OFF,
        )
        return str(trainer.plan())

    assert "main  StepLR   once a step" in plan(type="StepLR", step_size=1)
    assert "main  StepLR   after the last step of each epoch" in plan(type="StepLR", step_size=1, per="epoch")
    by_metric = plan(**PLATEAU, metric="error")
    assert "ReduceLROnPlateau by `error` after each evaluation" in by_metric
    assert "end of the step" not in by_metric


EVAL = {"eval_data": batches(1), "evaluate": {"every": 1}}


@pytest.mark.parametrize(
    ("scheduler", "sections", "code", "path"),
    [
        (PLATEAU, EVAL, "SL102", "optimizers.main.scheduler.metric"),
        ({**PLATEAU, "metric": "error"}, {"evaluate": {"every": 1}}, "SL122", "optimizers.main.scheduler.metric"),
        ({**PLATEAU, "metric": "error"}, {"eval_data": batches(1)}, "SL122", "optimizers.main.scheduler.metric"),
        ({**PLATEAU, "metric": "error", "per": "epoch"}, EVAL, "SL101", "optimizers.main.scheduler.per"),
        (
            {**PLATEAU, "metric": "loss/eval"},
            {**EVAL, "evaluate": {"every": 1, "loss": False}},
            "SL122",
            "optimizers.main.scheduler.metric",
        ),
        ({"type": "StepLR", "step_size": 1, "per": "week"}, {}, "SL104", "optimizers.main.scheduler.per"),
        ({"type": "StepLR", "step_size": 1, "metric": "error"}, EVAL, "SL101", "optimizers.main.scheduler.metric"),
        ({**PLATEAU, "metric": "error", "factor": 1.5}, EVAL, "SL114", "optimizers.main.scheduler.factor"),
        (
            {"type": "OneCycleLR", "max_lr": 1.0, "total_steps": 3, "per": "epoch"},
            {"run": {"max_epochs": 4}},
            "SL114",
            "optimizers.main.scheduler.total_steps",
        ),
        (
            {"type": "ChainedScheduler", "schedulers": [{"type": "StepLR", "step_size": 1, "per": "epoch"}]},
            {},
            "SL122",
            "optimizers.main.scheduler.schedulers.0.per",
        ),
    ],
)
def test_a_schedule_that_would_never_move_is_refused(scheduler: Any, sections: Any, code: str, path: str) -> None:
    sections = {"run": {"max_steps": 2}, **sections}
    with pytest.raises(sl.FaultError, match=code) as caught:
        Measured(model=make_net(), data=batches(), optimizers={**SGD, "scheduler": scheduler}, log=OFF, **sections)
    assert path in caught.value.fault.where


def test_steps_of_a_run_do_not_bound_a_schedule_of_epochs() -> None:
    scheduler = {"type": "OneCycleLR", "max_lr": 1.0, "total_steps": 3, "per": "epoch"}
    run = {"max_steps": 9}
    Classify(model=make_net(), data=batches(), optimizers={**SGD, "scheduler": scheduler}, run=run, log=OFF).fit()


def test_a_metric_that_was_not_measured_is_named_with_those_that_were() -> None:
    optimizers = {**SGD, "scheduler": {**PLATEAU, "metric": "eror"}}
    trainer = Measured(model=make_net(), data=batches(), optimizers=optimizers, run={"max_steps": 2}, log=OFF, **EVAL)
    with pytest.raises(sl.FaultError, match="SL122") as caught:
        trainer.fit()
    assert "`error`" in caught.value.fault.what


def test_a_declared_run_refuses_an_unknown_metric_when_it_is_loaded(tmp_path: Any) -> None:
    text = """\
run: {max_steps: 10}
model: {target: "torch.nn:Linear", args: [64, 10]}
data: {train: {target: "safeloop.datasets:Digits"}, eval: {target: "safeloop.datasets:Digits"}}
optimizers: {type: SGD, lr: 0.1, scheduler: {type: ReduceLROnPlateau, metric: accuracy}}
losses: {ce: {type: CrossEntropyLoss}}
metrics: {acuracy: {target: "safeloop.metrics:Accuracy"}}
evaluate: {every: 5}
"""
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(sl.FaultError, match="SL122") as caught:
        sl.config.load(path, environment={})
    assert ":4:" in caught.value.fault.where
    path.write_text(text.replace("acuracy", "accuracy"))
    sl.config.load(path, environment={})


def test_a_schedule_per_epoch_of_data_that_can_be_read_once_is_refused() -> None:
    optimizers = {**SGD, "scheduler": {"type": "StepLR", "step_size": 1, "per": "epoch"}}
    trainer = Classify(model=make_net(), data=iter(batches()), optimizers=optimizers, run={"max_steps": 2}, log=OFF)
    with pytest.raises(sl.FaultError, match="SL122"):
        trainer.fit()
