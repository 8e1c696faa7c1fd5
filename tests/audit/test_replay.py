"""Replay on failure, through a Trainer: what it says, and that it leaves no trace."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import safeloop as sl
from safeloop import assembly
from safeloop.step import DeferredGate
from safeloop.step.randomness import FIRST_TURNS

BAD = 3
ADAMW = {"type": "AdamW", "lr": 1e-2}


class Root(sl.Trainer):
    """Fails on a batch whose `scale` is 0: sqrt at 0 in the term `root`, its value finite."""

    calls = 0

    def losses(self, batch):
        self.calls += 1
        y = self.model(batch["x"])
        root = (y * batch["scale"]).square().sum(1).sqrt()  # the line
        return {"fit": F.mse_loss(y, batch["y"]), "root": root.mean()}


def batches(count, *, bad=(BAD,)):
    generator = torch.Generator().manual_seed(0)
    made = [
        {"x": torch.randn(8, 6, generator=generator), "y": torch.randn(8, 3, generator=generator), "scale": 1.0}
        for _ in range(count)
    ]
    for index in bad:
        made[index]["scale"] = 0.0
    return made


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


def trainer(kind=Root, *, data=None, model=None, **sections):
    sections = {"run": {"max_epochs": 1}, "log": {"sinks": []}, "optimizers": ADAMW, **sections}
    return kind(model=model or net(), data=batches(6) if data is None else data, **sections)


def error_of(run):
    with pytest.raises(sl.FaultError) as caught:
        run.fit()
    return caught.value


def state_of(run):
    """All that training goes on from."""
    gradients = {n: p.grad for n, p in run.model.named_parameters() if p.grad is not None}
    rng = {"cpu": torch.get_rng_state(), "python": torch.tensor(random.getstate()[1])}
    rng["numpy"] = torch.from_numpy(np.random.get_state()[1].astype(np.int64))
    modes = {n: torch.tensor(m.training) for n, m in run.model.named_modules()}
    return [run.model.state_dict(), gradients, rng, modes]


def assert_same_state(run, state):
    for ours, theirs in zip(state_of(run), state, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert torch.equal(value.nan_to_num(7.0), theirs[name].nan_to_num(7.0)), name


@pytest.fixture
def deferred(monkeypatch):
    """What CUDA with fused optimizers gets."""
    monkeypatch.setattr(assembly, "_gate", lambda config, owners, device, *_: DeferredGate(owners.values(), device))


def test_the_fault_names_term_line_and_reason():
    fault = error_of(trainer()).fault
    assert fault.code == "SL501"
    assert "loss term `root`" in fault.what
    assert f"step {BAD}; born in `SqrtBackward0`" in fault.where
    assert "test_replay.py" in fault.where
    assert "# the line" in fault.where
    assert "the derivative of `sqrt` at 0 is infinite" in fault.why
    assert "replay" not in fault.why, "dropout and running statistics came out the same"


SETTINGS = {
    "plain": {},
    "accumulation": {"accumulate": {"micro_batches": 2}},
    "bf16": {"run": {"max_epochs": 1, "precision": "bf16"}},
    "clipped": {"optimizers": {**ADAMW, "max_norm": 1.0}},
    "exact norms": {"log": {"sinks": [], "exact_term_norms": {"every": 1}}},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_replay_that_ends_a_run_changes_nothing(settings):
    plain = trainer(audit={"level": "off"}, **settings)
    assert "born" not in error_of(plain).fault.where
    state = state_of(plain)
    run = trainer(**settings)
    assert "born in" in error_of(run).fault.where
    assert_same_state(run, state)
    assert run.calls == plain.calls


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_training_goes_on_after_a_replayed_skip_with_the_same_bits(settings):
    skip = {"policy": "skip", "max_consecutive": 3}
    plain = trainer(audit={"level": "off"}, nonfinite=skip, data=batches(9, bad=(2, 5)), **settings)
    plain.fit()
    state = state_of(plain)
    run = trainer(nonfinite=skip, data=batches(9, bad=(2, 5)), **settings)
    result = run.fit()
    assert_same_state(run, state)
    assert run.calls == plain.calls
    assert [(fault.code, fault.severity) for fault in result.faults] == [("SL501", "warning")], "the first skip only"
    assert "# the line" in result.faults[0].where
    assert "the update was skipped" in result.faults[0].what


def test_no_hook_and_no_mode_is_left():
    run = trainer()
    error_of(run)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in run.model.modules())
    assert _get_current_dispatch_mode_stack() == []
    assert torch.overrides._get_current_function_mode() is None


def test_too_many_skips_say_where_the_last_was_born():
    error = error_of(trainer(nonfinite={"policy": "skip", "max_consecutive": 1}, data=batches(6, bad=(1, 2, 3))))
    assert [error.fault.code, *(fault.code for fault in error.others)] == ["SL602", "SL501"]
    assert "# the line" in error.others[0].where


def test_the_micro_batch_is_named():
    settings = {"accumulate": {"micro_batches": 3}}
    fault = error_of(trainer(data=batches(6, bad=(4,)), **settings)).fault
    assert "step 1, micro-batch 2 of 3; born in" in fault.where
    assert "replay" not in fault.why


@pytest.mark.parametrize("bad", [0, BAD, 5], ids=["first", "middle", "last"])
@pytest.mark.usefixtures("deferred")
def test_a_check_that_is_read_one_turn_later_replays_the_turn_before(bad):
    spec = {"type": "AdamW", "lr": 1e-2, "fused": True}
    plain = trainer(data=batches(6, bad=(bad,)), optimizers=spec, audit={"level": "off"})
    error_of(plain)
    state = state_of(plain)
    run = trainer(data=batches(6, bad=(bad,)), optimizers=spec)
    fault = error_of(run).fault
    assert f"step {bad}; born in" in fault.where
    assert "# the line" in fault.where
    assert "of 6 gradients hold NaN" in fault.what
    assert "no weight has changed since" in fault.where
    assert "replay" not in fault.why
    assert_same_state(run, state)


class Gan(sl.Trainer):
    @sl.phase(trains="critic")
    def critic_phase(self, x):
        fake = self.model["generator"](torch.randn(len(x), 3))
        return {"real": -self.model["critic"](x).mean(), "fake": self.model["critic"](fake).mean()}

    @sl.phase(trains="generator", repeat=2)
    def generator_phase(self, x):
        made = self.model["generator"](torch.randn(len(x), 3))
        gap = (made - made.detach()).square().sum(1)
        return {"adversarial": -self.model["critic"](made).mean(), "gap": gap.sqrt().mean()}  # the line


def gan(**sections):
    torch.manual_seed(0)
    model = nn.ModuleDict({"generator": nn.Linear(3, 4), "critic": nn.Linear(4, 1)})
    optimizers = {name: {"type": "Adam", "lr": 1e-3, "params": [f"{name}.*"]} for name in model}
    return trainer(Gan, model=model, data=[torch.randn(5, 4) for _ in range(12)], optimizers=optimizers, **sections)


def test_a_phase_is_replayed_in_its_own_freeze():
    run = gan()
    fault = error_of(run).fault
    assert "phase `generator_phase`; born in `SqrtBackward0`" in fault.where
    assert "2 of 2 gradients" in fault.what
    assert "replay" not in fault.why
    assert all(parameter.requires_grad for parameter in run.model.parameters())


@pytest.mark.usefixtures("deferred")
def test_a_phase_whose_check_is_read_in_another_phase_is_replayed_in_its_own_freeze():
    class Reversed(Gan):
        @sl.phase(trains="generator")
        def a_phase(self, x):
            return Gan.generator_phase(self, x)

        @sl.phase(trains="critic")
        def generator_phase(self, x):
            return {"real": -self.model["critic"](x).mean()}

        @sl.phase(trains="critic")
        def critic_phase(self, x):
            return {"other": self.model["critic"](x).square().mean()}

    torch.manual_seed(0)
    model = nn.ModuleDict({"generator": nn.Linear(3, 4), "critic": nn.Linear(4, 1)})
    optimizers = {n: {"type": "Adam", "lr": 1e-3, "fused": True, "params": [f"{n}.*"]} for n in model}
    run = trainer(Reversed, model=model, data=[torch.randn(5, 4) for _ in range(12)], optimizers=optimizers)
    fault = error_of(run).fault
    assert "phase `a_phase`; born in `SqrtBackward0`" in fault.where
    assert all(parameter.requires_grad for parameter in run.model.parameters())


def test_every_evaluation_of_a_closure_is_replayed():
    class Narrow(sl.Trainer):
        def loss(self, batch):
            return (self.model(batch).square().sum() - 1e-3).log()  # the line

    run = trainer(Narrow, model=nn.Linear(4, 1), data=[torch.ones(8, 4)] * 20, optimizers={"type": "LBFGS", "lr": 1.0})
    error = error_of(run)
    assert error.fault.code == "SL405"
    assert "born in `log` in the forward" in error.fault.where
    assert "replay" not in error.fault.why


def test_terms_that_train_apart_are_told_apart():
    class Apart(sl.Trainer):
        def losses(self, batch):
            y = self.model["lift"](batch)
            zero = self.model["head"](y) * 0
            return {"lift": y.square().mean(), "head": zero.square().sum(1).sqrt().mean()}

    model = nn.ModuleDict({"lift": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    losses = {"lift": {"trains": ["lift.*"]}, "head": {"trains": ["head.*"]}}
    run = trainer(Apart, model=model, data=[torch.randn(8, 4)], losses=losses, simultaneous=True)
    fault = error_of(run).fault
    assert "loss term `head`" in fault.what
    assert fault.names == ("head.weight", "head.bias")
    assert "SqrtBackward0" in fault.where


def test_terms_behind_a_reentrant_checkpoint_are_found_together():
    from torch.utils.checkpoint import checkpoint

    class Saving(sl.Trainer):
        def loss(self, batch):
            hidden = checkpoint(self.model, batch.clone().requires_grad_(), use_reentrant=True)
            return (hidden * 0).square().sum(1).sqrt().mean()  # the line

    fault = error_of(trainer(Saving, data=[torch.randn(8, 6)])).fault
    assert "# the line" in fault.where


def test_a_sum_of_finite_gradients_that_overflows_is_told():
    class Large(sl.Trainer):
        def losses(self, batch):
            y = self.model(batch).mean()
            return {"one": y * 2e38, "other": y * 2e38}

    model = nn.Linear(2, 1)
    fault = error_of(trainer(Large, model=model, data=[torch.ones(2, 2)])).fault
    assert "born in `add` in the forward" in fault.where


def test_a_batch_that_holds_nan_is_named_by_its_path():
    data = batches(4, bad=())
    data[2]["x"][1, :3] = float("nan")
    fault = error_of(trainer(data=data)).fault
    assert fault.code == "SL405"
    assert 'step 2; `batch["x"]` holds 3 NaN of 48 entries' in fault.where
    assert "data set" in fault.fix


def test_a_batch_that_holds_nan_in_a_part_that_is_not_used_is_not_blamed():
    data = batches(6)
    for batch in data:
        batch["unused"] = torch.full((3,), float("nan"))
    assert "SqrtBackward0" in error_of(trainer(data=data)).fault.where


def test_a_weight_that_is_nan_already_is_named():
    model = net()
    with torch.no_grad():
        model[4].weight[0, 0] = float("nan")
    fault = error_of(trainer(model=model, data=batches(2, bad=()))).fault
    assert "parameter `4.weight`" in fault.where
    assert "bad before the step" in fault.fix


class Draws(Root):
    source = "numpy"
    since = 0

    def losses(self, batch):
        terms = super().losses(batch)
        if self.step >= self.since:
            number = {"numpy": np.random.rand, "python": random.random, "torch": lambda: torch.rand(())}[self.source]()
            terms["fit"] = terms["fit"] * number
        return terms


@pytest.mark.parametrize("source", ["numpy", "python", "torch"])
def test_random_numbers_are_replayed(source):
    kind = type("Run", (Draws,), {"source": source})
    bad = FIRST_TURNS + 17
    fault = error_of(trainer(kind, data=batches(bad + 1, bad=(bad,)))).fault
    assert "# the line" in fault.where
    assert "replay" not in fault.why


@pytest.mark.parametrize("source", ["numpy", "torch"])
def test_random_numbers_that_are_first_drawn_just_before_are_said_to_be_unknown(source):
    bad = FIRST_TURNS + 17
    kind = type("Run", (Draws,), {"since": bad - 2, "source": source})
    without_dropout = nn.Linear(6, 3)
    fault = error_of(trainer(kind, data=batches(bad + 1, bad=(bad,)), model=without_dropout)).fault
    assert "# the line" in fault.where
    assert "other values" in fault.why
    assert "for the first time" in fault.why


def test_a_loss_function_with_a_memory_is_said_not_to_be_reproduced():
    class Counts(Root):
        def losses(self, batch):
            terms = super().losses(batch)
            return terms | {"fit": terms["fit"] * self.calls}

    fault = error_of(trainer(Counts)).fault
    assert "a replay of the step gave other values (`fit`" in fault.why
    assert "state that the loss function keeps" in fault.why


def test_a_loss_function_that_fails_only_once_is_said_so():
    class Once(sl.Trainer):
        seen: list[int] = []

        def loss(self, batch):
            self.seen.append(1)
            return self.model(batch).mean() * (float("nan") if len(self.seen) == 4 else 1.0)

    fault = error_of(trainer(Once, data=[torch.randn(8, 6)] * 6)).fault
    assert fault.code == "SL405"
    assert "born" not in fault.where
    assert "other values" in fault.why


def test_a_loss_function_that_raises_in_the_replay_hides_nothing():
    class Raises(Root):
        seen: list[int] = []

        def losses(self, batch):
            self.seen.append(1)
            if len(self.seen) == BAD + 2:
                raise ValueError("called once too often")
            return super().losses(batch)

    error = error_of(trainer(Raises))
    assert error.fault.code == "SL501"
    assert "ended in ValueError: called once too often" in error.fault.why


def test_a_batch_edited_in_place_is_put_back():
    class Edits(sl.Trainer):
        def loss(self, batch):
            batch.add_(1)
            return (self.model(batch) * 0).square().sum(1).sqrt().mean()

    data = [torch.zeros(8, 6)]
    error_of(trainer(Edits, data=data))
    assert torch.equal(data[0], torch.ones(8, 6))


def test_a_custom_step_keeps_its_fault_without_an_origin():
    class Own(sl.Trainer):
        def custom_step(self, ops, batch):
            ops.zero()
            ops.backward({"root": (self.model(batch) * 0).square().sum(1).sqrt().mean()})
            ops.update()

    fault = error_of(trainer(Own, data=[torch.randn(8, 6)])).fault
    assert fault.code == "SL501"
    assert "born in `" not in fault.where


def test_an_overflow_that_only_sets_the_scale_of_fp16_is_no_fault():
    class Steep(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).float().square().mean() * 1e3

    run = trainer(Steep, data=[torch.randn(8, 6)] * 12, run={"max_epochs": 1, "precision": "fp16"})
    assert run.fit().faults == ()


def test_an_overflow_of_the_forward_in_fp16_is_told():
    class Steep(sl.Trainer):
        def loss(self, batch):
            return (self.model(batch) * 1e5).square().mean()  # the line

    run = trainer(Steep, data=[torch.randn(8, 6)] * 3, run={"max_epochs": 1, "precision": "fp16"})
    faults = run.fit().faults
    assert faults[0].code == "SL405"
    assert "65504" in faults[0].why
