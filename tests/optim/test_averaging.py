"""EMA and SWA against torch's `AveragedModel` in plain loops, and against means of snapshots in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

import safeloop as sl
from safeloop import assembly
from safeloop.optim.averaging import Average, EmaSpec, SwaSpec
from safeloop.step import ImmediateGate, Precision

OFF: dict[str, Any] = {"sinks": []}
STEPS = 20
EMA = {"type": "ema", "decay": 0.9}
SGD = {"type": "SGD", "lr": 0.1, "momentum": 0.9}


class Net(nn.Module):
    """With running statistics, a counter, and a mask that holds an infinity on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return self.layers(x)


def make_net() -> Net:
    torch.manual_seed(0)
    return Net()


def batches(n: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 4, generator=generator), torch.randint(3, (16,), generator=generator)) for _ in range(n)]


class Classify(sl.Trainer):
    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.model(x), y)


def train(net: nn.Module, *, cls: type[sl.Trainer] = Classify, steps: int = STEPS, **sections: Any) -> sl.Trainer:
    sections = {"data": batches(), "optimizers": SGD, "log": OFF, **sections}
    trainer = cls(model=net, run={"max_steps": steps, **sections.pop("run", {})}, **sections)
    trainer.result = trainer.fit()
    return trainer


def plain(net: nn.Module, steps: int = STEPS):
    """The plain loop; after each update, the number of steps so far."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True)
    torch.manual_seed(0)
    for step, (x, y) in enumerate((batches() * 9)[:steps], start=1):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        yield step


def assert_same(a: nn.Module, b: nn.Module) -> None:
    expected = b.state_dict()
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


SPECS = {
    "ema": (EMA, get_ema_multi_avg_fn(0.9), lambda step: True),
    "swa": ({"type": "swa", "start": 5}, get_swa_multi_avg_fn(), lambda step: step >= 5),
    "swa, every 3": (
        {"type": "swa", "start": 5, "every": 3},
        get_swa_multi_avg_fn(),
        lambda step: step in (5, 8, 11, 14, 17, 20),
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_the_average_has_the_bits_of_torchs_own_and_the_live_weights_those_of_a_run_without(name: str) -> None:
    spec, rule, is_due = SPECS[name]
    reference, ours = make_net(), make_net()
    theirs = AveragedModel(reference, multi_avg_fn=rule)
    statistics: list[Tensor] = []
    for step in plain(reference):
        if is_due(step):
            theirs.update_parameters(reference)
            norm = reference.layers[1]
            now = [norm.running_mean.clone(), norm.running_var.clone()]
            if statistics:
                rule(statistics, now, int(theirs.n_averaged) - 1)
            statistics = statistics or now
    trainer = train(ours, average=spec)
    assert_same(ours, reference)
    averaged = trainer.averaged_model
    for (full, a), b in zip(averaged.named_parameters(), theirs.module.parameters(), strict=True):
        assert torch.equal(a, b), full
    assert not torch.equal(averaged.layers[4].weight, ours.layers[4].weight), "the test must average something"
    norm = averaged.layers[1]
    assert torch.equal(norm.running_mean, statistics[0])
    assert torch.equal(norm.running_var, statistics[1])
    for full in ("mask", "calls", "layers.1.num_batches_tracked"):
        assert torch.equal(averaged.get_buffer(full), ours.get_buffer(full)), "other buffers are copies"


def snapshots(steps: int = STEPS) -> list[dict[str, Tensor]]:
    net = make_net()
    return [{n: p.detach().double().clone() for n, p in net.named_parameters()} for _ in plain(net, steps)]


def test_a_warm_up_follows_its_formula() -> None:
    trainer = train(make_net(), average={"type": "ema", "decay": 0.8, "warmup": 10})
    first, *rest = snapshots()
    expected = first
    for n, weights in enumerate(rest, start=1):
        decay = min(0.8, (1 + n) / (10 + n))
        expected = {name: decay * e + (1 - decay) * weights[name] for name, e in expected.items()}
    for name, parameter in trainer.averaged_model.named_parameters():
        assert torch.allclose(parameter.double(), expected[name], rtol=0, atol=1e-6), name
    decays = [EmaSpec(decay=0.8, warmup=10).decay_at(n) for n in range(100)]
    assert decays == sorted(decays)
    assert decays[0] == 0.1
    assert decays[-1] == 0.8


def test_swa_is_the_mean_of_the_weights_that_count() -> None:
    trainer = train(make_net(), average={"type": "swa", "start": 4, "every": 5})
    counted = [weights for step, weights in enumerate(snapshots(), start=1) if step in (4, 9, 14, 19)]
    for name, parameter in trainer.averaged_model.named_parameters():
        mean = torch.stack([weights[name] for weights in counted]).mean(0)
        assert torch.allclose(parameter.double(), mean, rtol=0, atol=1e-6), name


class Measured(Classify):
    def metrics(self, batch: Any) -> dict[str, Any]:
        assert not self.model.training
        self.evaluated = self.model
        return {"sum": self.model.layers[0].weight.sum().item(), "out": self.model(batch[0]).sum(1)}


def test_an_evaluation_sees_the_average_and_leaves_the_live_weights_bitwise_untouched() -> None:
    quiet = train(make_net())
    watched = train(make_net(), cls=Measured, average=EMA, eval_data=batches(2), evaluate={"every": 3, "loss": True})
    assert watched.evaluated is watched.averaged_model
    assert watched.model is not watched.averaged_model
    assert watched.result.metrics["sum"] == pytest.approx(watched.averaged_model.layers[0].weight.sum().item())
    assert watched.result.metrics["sum"] != pytest.approx(watched.model.layers[0].weight.sum().item())
    assert_same(watched.model, quiet.model)
    assert watched.model.training
    averaged = copy.deepcopy(watched.averaged_model).eval()
    with torch.no_grad():
        losses = [F.cross_entropy(averaged(x), y).item() for x, y in batches(2)]
    assert watched.result.metrics["loss/eval"] == pytest.approx(sum(losses) / 2)


def test_a_kept_reference_to_the_live_model_cannot_change_it_in_an_evaluation() -> None:
    class Keeps(Classify):
        def metrics(self, batch: Any) -> dict[str, Any]:
            self.kept.train()
            self.kept(batch[0])
            return {"one": 1.0}

    quiet, net = train(make_net()), make_net()
    Keeps.kept = net
    assert_same(train(net, cls=Keeps, average=EMA, eval_data=batches(2), evaluate={"every": 3}).model, quiet.model)


def test_before_the_first_average_the_live_weights_are_evaluated() -> None:
    seen = []

    class Which(Measured):
        def metrics(self, batch: Any) -> dict[str, Any]:
            seen.append((self.step, self.model is self.averaged_model))
            return {"one": 1.0}

    train(make_net(), cls=Which, average={"type": "swa", "start": 10}, eval_data=batches(1), evaluate={"every": 5})
    assert seen == [(5, False), (10, True), (15, True), (20, True)]


def test_a_declared_run_evaluates_the_average(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    trainer = sl.Trainer(
        model=net,
        data=batches(),
        eval_data=batches(2),
        optimizers=SGD,
        losses={"ce": {"type": "CrossEntropyLoss"}},
        metrics={"error": {"target": "torch.nn:CrossEntropyLoss"}},
        average=EMA,
        run={"max_steps": 5},
        log=OFF,
    )
    result = trainer.fit()
    with torch.no_grad():
        expected = [F.cross_entropy(trainer.averaged_model(x), y).item() for x, y in batches(2)]
    assert result.metrics["error"] == pytest.approx(sum(expected) / 2)


def test_a_step_whose_update_was_skipped_is_not_averaged() -> None:
    data = batches(6)
    data[2][0][0, 0] = torch.nan
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    without = copy.deepcopy(net)
    skip = {"policy": "skip", "max_consecutive": 1}
    trainer = train(net, data=data, nonfinite=skip, average=EMA, steps=6)
    other = train(without, data=data[:2] + data[3:], average=EMA, steps=5)
    assert_same(trainer.averaged_model, other.averaged_model)
    assert trainer._assembled().average.num_averaged == 5


def test_nothing_non_finite_reaches_the_average() -> None:
    class Explodes(Classify):
        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch) * (1e25 if self.step == 3 else 1.0)

    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    sgd = {"type": "SGD", "lr": 1e-1}
    before = train(copy.deepcopy(net), optimizers=sgd, average=EMA, steps=3).averaged_model
    huge = {**sgd, "scheduler": {"type": "MultiStepLR", "milestones": [3], "gamma": 1e20}}
    trainer = Explodes(model=net, data=batches(), optimizers=huge, average=EMA, run={"max_steps": 9}, log=OFF)
    with pytest.raises(sl.FaultError, match="SL605") as caught:
        trainer.fit()
    assert "weight" in caught.value.fault.what
    assert not net.weight.isfinite().all()
    assert_same(trainer.averaged_model, before)


def test_a_running_statistic_that_a_skipped_batch_has_reached_is_kept_out() -> None:
    net = make_net()
    average = Average(EmaSpec(), net)
    average.update(net, 1)
    net.layers[1].running_mean[2] = torch.nan
    with pytest.raises(sl.FaultError, match="SL605") as caught:
        average.update(net, 2)
    assert "layers.1.running_mean" in caught.value.fault.what
    assert average.model.layers[1].running_mean.isfinite().all()


def test_finite_weights_whose_norm_overflows_are_averaged() -> None:
    net = nn.Linear(2, 2)
    with torch.no_grad():
        net.weight.fill_(1e30)
    average = Average(SwaSpec(start=1), net)
    average.update(net, 1)
    average.update(net, 2)
    assert torch.equal(average.model.weight, net.weight)


def test_the_average_is_saved_beside_the_live_weights(tmp_path: Path) -> None:
    net = make_net()
    trainer = train(net, average=EMA, run={"dir": str(tmp_path)}, log={"sinks": ["jsonl"]}, steps=4)
    folder = trainer.result.dir
    assert {"model.safetensors", "average.safetensors"} <= {path.name for path in folder.iterdir()}
    loaded = make_net()
    safetensors.torch.load_model(loaded, str(folder / "average.safetensors"))
    assert_same(loaded, trainer.averaged_model)
    assert (folder / "average.safetensors").stat().st_mode & 0o777 == 0o600
    none = train(make_net(), run={"dir": str(tmp_path)}, log={"sinks": ["jsonl"]}, steps=1)
    assert not (none.result.dir / "average.safetensors").exists()


def test_the_copy_takes_no_gradient_and_no_random_number() -> None:
    net = make_net()
    net.layers[0].weight.grad = torch.ones_like(net.layers[0].weight)
    state = torch.get_rng_state()
    average = Average(EmaSpec(), net)
    average.update(net, 1)
    average.update(net, 2)
    assert torch.equal(state, torch.get_rng_state())
    assert all(not p.requires_grad and p.grad is None for p in average.model.parameters())
    assert all(p.requires_grad for p in net.parameters())
    assert net.layers[0].weight.grad is not None


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        (EMA, "average   ema, decay 0.9"),
        ({"type": "ema", "warmup": 10}, "average   ema, decay 0.999, warm-up 10"),
        ({"type": "swa", "start": 3, "every": 2}, "average   swa from step 3, every 2 steps"),
    ],
)
def test_the_plan_ends_with_the_average(spec: dict[str, Any], line: str) -> None:
    trainer = Classify(model=make_net(), data=batches(), optimizers=SGD, average=spec, run={"max_steps": 9}, log=OFF)
    plan = trainer.plan()
    assert plan.closing[-1].verb == "average"
    assert line in str(plan).partition("end of the step")[2]


def test_what_is_averaged_is_known_to_be_finite_before() -> None:
    trainer = Classify(model=make_net(), data=batches(), optimizers=SGD, average=EMA, run={"max_steps": 1}, log=OFF)
    owners = trainer._assembled().owners
    cuda = torch.device("cuda")
    assert isinstance(assembly._gate(trainer.config, owners, cuda, Precision("fp32", cuda)), ImmediateGate)


@pytest.mark.parametrize(
    ("average", "code", "path"),
    [
        ({"type": "ema", "decay": 1.0}, "SL104", "average.decay"),
        ({"type": "ema", "deccay": 0.9}, "SL101", "average.deccay"),
        ({"type": "ema", "start": 3}, "SL101", "average.start"),
        ({"type": "sma"}, "SL105", "average.type"),
        ({"decay": 0.9}, "SL102", "average.type"),
        ({"type": "swa"}, "SL102", "average.start"),
        ({"type": "swa", "start": 10}, "SL121", "average.start"),
        ({"type": "swa", "start": 1, "every": 0}, "SL104", "average.every"),
    ],
)
def test_what_cannot_be_meant_is_refused(average: dict[str, Any], code: str, path: str) -> None:
    with pytest.raises(sl.FaultError, match=code) as caught:
        train(make_net(), average=average, steps=9)
    assert path in caught.value.fault.where


def test_a_run_that_ends_before_its_average_starts_is_warned_of() -> None:
    class Epochs(Classify):
        pass

    trainer = Epochs(
        model=make_net(),
        data=batches(3),
        optimizers=SGD,
        average={"type": "swa", "start": 4},
        run={"max_epochs": 1},
        log=OFF,
    )
    (fault,) = trainer.fit().faults
    assert (fault.code, fault.severity) == ("SL121", "warning")


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    net = make_net()
    net.lock = iter(())
    net.broken = (i for i in ())
    with pytest.raises(sl.FaultError, match="SL606"):
        train(net, average=EMA)
