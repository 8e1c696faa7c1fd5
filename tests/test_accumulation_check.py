"""`check --accumulation` against gradients by hand: it is equal where it should be, and names the reason where not."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner

import safeloop as sl
from safeloop.cli.main import app
from safeloop.data.join import CannotJoin, joined

SGD = {"type": "SGD", "lr": 0.1}


class Classify(sl.Trainer):
    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.model(x), y)


class Summed(sl.Trainer):
    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.model(x), y, reduction="sum")


class Masked(sl.Trainer):
    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.model(x), y, ignore_index=-1)


def net(*layers: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), *(layers or (nn.Tanh(),)), nn.Linear(8, 3)).to(dtype)


def batches(*sizes: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 4, generator=generator, dtype=dtype), torch.randint(3, (n,), generator=generator))
        for n in sizes
    ]


def made(cls: type[sl.Trainer], model: nn.Module, data: Any, window: int = 0, **sections: Any) -> sl.Trainer:
    accumulate = {"micro_batches": window or len(data), **sections.pop("accumulate", {})}
    sections.setdefault("optimizers", SGD)
    return cls(model=model, data=data, accumulate=accumulate, run={"max_steps": 1}, log={"sinks": []}, **sections)


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 6), min_size=2, max_size=5), is_double=st.booleans())
def test_a_mean_over_samples_is_equal_whatever_the_sizes(sizes: list[int], is_double: bool) -> None:
    dtype = torch.float64 if is_double else torch.float32
    trainer = made(Classify, net(dtype=dtype), batches(*sizes, dtype=dtype))
    report = trainer.check_accumulation()
    assert report.is_equal
    assert not report.faults
    assert not trainer.faults
    assert report.differences["main"] <= (1e-12 if is_double else 1e-5)
    assert report.sizes == tuple(sizes)


def test_the_relative_difference_is_that_of_gradients_by_hand() -> None:
    model, data = net(), batches(2, 6)
    plain = copy.deepcopy(model)
    by_hand = [torch.zeros_like(p) for p in plain.parameters()]
    for x, y in data:
        for total, g in zip(
            by_hand, torch.autograd.grad(F.cross_entropy(plain(x), y), plain.parameters()), strict=True
        ):
            total += g / 2
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    full = torch.autograd.grad(F.cross_entropy(plain(x), y), plain.parameters())
    expected = sum(float((a - b).square().sum()) for a, b in zip(by_hand, full, strict=True)) ** 0.5
    norm = sum(float(b.square().sum()) for b in full) ** 0.5
    report = made(Classify, model, data, accumulate={"weight_by": "batches"}).check_accumulation()
    assert report.differences["main"] == pytest.approx(expected / norm, rel=1e-9)
    [fault] = report.faults
    assert fault.code == "SL613"
    assert "mean over samples" in fault.why
    assert "0.25, 0.75" in fault.what
    assert "accumulate.weight_by: samples" in fault.fix


def test_a_summed_loss_is_found_by_the_ratio() -> None:
    report = made(Summed, net(), batches(4, 4, 4, 4)).check_accumulation()
    [fault] = report.faults
    assert report.ratios["main"] == pytest.approx(0.25)
    assert "reduction='sum'" in fault.why


def test_a_mean_over_tokens_is_found_and_its_count_named() -> None:
    data = batches(6, 6, 6)
    data[0][1][1:] = -1
    data[2][1][::2] = -1
    [fault] = made(Masked, net(), data).check_accumulation().faults
    assert "labels that are not -1" in fault.why
    assert "`batch[1]`" in fault.why
    assert "1, 6, 3" in fault.why
    assert "count_tokens" in fault.fix

    class Counted(Masked):
        def count_tokens(self, batch: Any) -> int:
            return int((batch[1] != -1).sum())

    assert made(Counted, net(), data, accumulate={"weight_by": "tokens"}).check_accumulation().is_equal
    [fault] = made(Counted, net(), data).check_accumulation().faults
    assert "mean over tokens" in fault.why


def test_batch_normalisation_is_named_and_alone_when_it_explains_all() -> None:
    trainer = made(Classify, net(nn.BatchNorm1d(8)), batches(4, 4))
    [fault] = trainer.check_accumulation().faults
    assert "`1` (BatchNorm1d) in eval mode: equal" in fault.what
    assert fault.why.startswith("1. batch normalisation")
    assert "2." not in fault.why
    assert fault.names == ("1",)
    assert trainer.faults == (fault,)


def test_dropout_is_named_and_can_be_accepted() -> None:
    [fault] = made(Classify, net(nn.Dropout(0.5)), batches(4, 4)).check_accumulation().faults
    assert "`1` (Dropout) in eval mode: equal" in fault.what
    assert "other masks" in fault.why
    accepting = made(Classify, net(nn.Dropout(0.5)), batches(4, 4), audit={"accept": {"SL613": ["1"]}})
    assert accepting.check_accumulation().faults == ()
    assert accepting.faults == ()


def test_several_causes_are_all_told() -> None:
    layers = nn.BatchNorm1d(8), nn.Dropout(0.5)
    [fault] = made(Summed, net(*layers), batches(4, 4)).check_accumulation().faults
    assert fault.why.startswith("1. the loss is a sum")
    assert "batch normalisation" in fault.why
    assert "dropout" in fault.why


def test_a_layer_in_eval_mode_is_no_cause() -> None:
    class Frozen(nn.BatchNorm1d):
        def train(self, mode: bool = True) -> Frozen:
            return super().train(False)

    assert made(Classify, net(Frozen(8)).train(), batches(4, 4)).check_accumulation().is_equal


def test_samples_that_act_on_each_other_are_told() -> None:
    class Contrast(sl.Trainer):
        def loss(self, batch: Any) -> Tensor:
            z = self.model(batch[0])
            return F.cross_entropy(z @ z.T, torch.arange(len(z)))

    [fault] = made(Contrast, net(), batches(4, 4)).check_accumulation().faults
    assert "act on each other" in fault.why


def test_a_loss_that_draws_random_numbers_is_told() -> None:
    class Noisy(sl.Trainer):
        def loss(self, batch: Any) -> Tensor:
            x, y = batch
            return F.cross_entropy(self.model(x + torch.randn_like(x)), y)

    [fault] = made(Noisy, net(), batches(4, 4)).check_accumulation().faults
    assert "draws random numbers" in fault.what


def test_each_owner_is_compared_in_the_phases_that_train_it() -> None:
    class Two(sl.Trainer):
        @sl.phase(trains="first")
        def one(self, batch: Any) -> dict[str, Tensor]:
            return {"ce": F.cross_entropy(self.model(batch[0]), batch[1])}

        @sl.phase(trains="second")
        def two(self, batch: Any) -> dict[str, Tensor]:
            return {"sum": F.cross_entropy(self.model(batch[0]), batch[1], reduction="sum")}

    optimizers = {"first": {**SGD, "params": ["0.*"]}, "second": {**SGD, "params": "rest"}}
    model = net()
    report = made(Two, model, batches(4, 4), optimizers=optimizers).check_accumulation()
    assert report.differences["first"] <= 1e-12
    assert report.differences["second"] == pytest.approx(0.5)
    assert [fault.code for fault in report.faults] == ["SL613"]
    assert "`two`" in report.faults[0].what
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_everything_is_bitwise_as_before() -> None:
    model = net(nn.BatchNorm1d(8), nn.Dropout(0.5))
    model[0].weight.grad = torch.full_like(model[0].weight, 2.0)
    held = model[0].weight.grad
    trainer = made(Summed, model, batches(4, 4))
    trainer.check()
    state = copy.deepcopy(model.state_dict())
    rng, numbers = torch.get_rng_state(), random.getstate()
    assert trainer.check_accumulation().faults
    assert torch.equal(rng, torch.get_rng_state())
    assert numbers == random.getstate()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert model[0].weight.grad is held
    assert torch.equal(held, torch.full_like(held, 2.0))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("is_one_shot", [False, True])
def test_the_run_afterwards_is_the_run_without_the_check(is_one_shot: bool) -> None:
    data = batches(4, 4, 3, 2, 4)

    def stream() -> Iterator[Any]:
        yield from data

    def run(checks: bool) -> tuple[nn.Module, sl.RunResult]:
        model = net()
        source = stream() if is_one_shot else data
        trainer = Classify(
            model=model, data=source, optimizers=SGD, accumulate={"micro_batches": 2},
            run={"max_epochs": 1}, log={"sinks": []},
        )  # fmt: skip
        if checks:
            assert trainer.check_accumulation().is_equal
        return model, trainer.fit()

    (checked, first), (plain, second) = run(True), run(False)
    assert first.steps == second.steps == 3
    assert all(torch.equal(a, b) for a, b in zip(checked.parameters(), plain.parameters(), strict=True))


def test_without_accumulation_it_says_what_to_set() -> None:
    with pytest.raises(sl.FaultError) as error:
        made(Classify, net(), batches(4), 1).check_accumulation()
    assert error.value.fault.code == "SL614"
    assert "accumulate.micro_batches" in error.value.fault.fix


def test_a_window_of_one_micro_batch_is_refused() -> None:
    with pytest.raises(sl.FaultError, match="holds 1 micro-batch"):
        made(Classify, net(), batches(4), 2).check_accumulation()


def test_micro_batches_of_different_lengths_are_refused_with_their_shapes() -> None:
    class Rows(sl.Trainer):
        def loss(self, batch: Any) -> Tensor:
            return self.model(batch.flatten()[:4]).square().mean()

    data = [torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)]
    with pytest.raises(sl.FaultError, match=r"\(2, 4\), \(2, 6\)") as error:
        made(Rows, net(), data).check_accumulation()
    assert error.value.fault.code == "SL614"


def test_batches_are_joined_part_by_part() -> None:
    one = {"x": torch.ones(2, 3), "meta": ([torch.zeros(1)], ["a", "b"]), "scale": torch.tensor(2.0), "name": "set"}
    two = {"x": torch.zeros(1, 3), "meta": ([torch.ones(4)], ["c"]), "scale": torch.tensor(2.0), "name": "set"}
    big = joined([one, two])
    assert big["x"].shape == (3, 3)
    assert big["meta"][0][0].tolist() == [0, 1, 1, 1, 1]
    assert big["meta"][1] == ["a", "b", "c"]
    assert big["scale"] == 2.0
    assert big["name"] == "set"
    assert one["x"].shape == (2, 3)
    for key, other in {"scale": torch.tensor(3.0), "name": "other", "meta": ([], ["c"]), "x": "text"}.items():
        with pytest.raises(CannotJoin, match=key):
            joined([one, {**two, key: other}])


CONFIG = """
run: {max_steps: 1, device: cpu}
model: {target: "torch.nn:Linear", args: [64, 10]}
data: {train: {target: "safeloop.datasets:Digits", args: {split: train, flat: true}}, batch_size: 16}
optimizers: {type: SGD, lr: 0.1}
losses: {ce: {type: CrossEntropyLoss, reduction: REDUCTION}}
accumulate: {micro_batches: 3}
"""


@pytest.mark.parametrize(("reduction", "status"), [("mean", 0), ("sum", 3)])
def test_the_command_tells_by_its_exit_status(
    reduction: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG.replace("REDUCTION", reduction))
    done = CliRunner().invoke(app, ["check", "run.yaml", "--accumulation"])
    assert done.exit_code == status, done.output
    assert "main: relative difference" in done.stdout
    assert ("SL613" in done.stderr) is bool(status)
    assert not (tmp_path / "runs").exists()
