from __future__ import annotations

import random

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch.optim import lr_scheduler

from safeloop.optim.specs import OPTIMIZERS, SCHEDULERS, AnyOptimizer, dry_construct
from safeloop.signatures import Refusal

NEEDED = {
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [1, 3]},
    "ExponentialLR": {"gamma": 0.9},
    "CosineAnnealingLR": {"T_max": 3},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 1.0, "step_size_up": 2},
    "OneCycleLR": {"max_lr": 1.0, "total_steps": 6},
    "SequentialLR": {
        "schedulers": [{"type": "LinearLR", "total_iters": 2}, {"type": "StepLR", "step_size": 1}],
        "milestones": [2],
    },
    "ChainedScheduler": {
        "schedulers": [{"type": "ConstantLR", "total_iters": 2}, {"type": "ExponentialLR", "gamma": 0.5}]
    },
}


def spec(**fields):
    return TypeAdapter(AnyOptimizer).validate_python(fields)


def parameter():
    return torch.nn.Parameter(torch.ones(2, 2))


def test_the_families_are_those_of_torch():
    assert len(OPTIMIZERS) == 15
    assert len(SCHEDULERS) == 13
    assert not {"LambdaLR", "MultiplicativeLR", "LRScheduler"} & set(SCHEDULERS)
    assert all(getattr(torch.optim, name) is model.torch_class for name, model in OPTIMIZERS.items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_not_written_keeps_torchs_default(name):
    built = spec(type=name).build([{"params": [parameter()]}])
    assert type(built) is getattr(torch.optim, name)
    assert built.defaults == type(built)([parameter()]).defaults
    assert spec(type=name).arguments() == {}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_written_reaches_torch(name):
    built = spec(type=name, lr=0.125).build([{"params": [parameter()]}])
    assert built.param_groups[0]["lr"] == 0.125


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_each_argument_of_a_group_is_one_that_torch_keeps_per_group(name):
    group = OPTIMIZERS[name].model_fields["groups"].annotation.__args__[0]
    defaults = getattr(torch.optim, name)([parameter()]).defaults
    assert set(group.model_fields) - {"params"} <= set(defaults)
    assert not {"fused", "foreach", "capturable"} & set(group.model_fields)


def test_a_group_holds_only_what_was_written():
    main = spec(type="AdamW", groups=[{"params": ["*.bias"], "weight_decay": 0.0, "lr": None}])
    assert main.groups[0].arguments() == {"weight_decay": 0.0}
    assert main.groups[0].params == ("*.bias",)


def test_a_default_serves_only_where_nothing_is_written():
    assert spec(type="Adam").build([{"params": [parameter()]}], fused=True).defaults["fused"] is True
    assert spec(type="Adam", fused=False).build([{"params": [parameter()]}], fused=True).defaults["fused"] is False
    assert (OPTIMIZERS["Adam"].accepts("fused"), OPTIMIZERS["Muon"].accepts("fused")) == (True, False)
    assert not OPTIMIZERS["Adam"].accepts("params")


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "ReduceLROnPlateau"])
def test_a_schedule_moves_as_torchs_own_does(name):
    main = spec(type="SGD", lr=0.5, momentum=0.9, scheduler={"type": name, **NEEDED.get(name, {})})
    assert dry_construct(main) is None
    ours = main.build([{"params": [parameter()]}])
    theirs = torch.optim.SGD([parameter()], lr=0.5, momentum=0.9)
    mine, plain = main.scheduler.build(ours), oracle(name, theirs)
    for _ in range(6):
        assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
        for optimizer, scheduler in ((ours, mine), (theirs, plain)):
            optimizer.step()
            scheduler.step()


def oracle(name, optimizer):
    if name == "SequentialLR":
        parts = [lr_scheduler.LinearLR(optimizer, total_iters=2), lr_scheduler.StepLR(optimizer, 1)]
        return lr_scheduler.SequentialLR(optimizer, parts, [2])
    if name == "ChainedScheduler":
        return lr_scheduler.ChainedScheduler(
            [lr_scheduler.ConstantLR(optimizer, total_iters=2), lr_scheduler.ExponentialLR(optimizer, 0.5)]
        )
    return getattr(lr_scheduler, name)(optimizer, **NEEDED.get(name, {}))


@pytest.mark.parametrize(
    "fields",
    [
        {"lr": True},
        {"lr": "1e-3"},
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"lr": -1},
        {"momentun": 0.9},
        {"max_norm": 0},
        {"max_norm": -1.0},
        {"params": "critic.*"},
        {"params": []},
        {"groups": [{"lr": 1}]},
        {"groups": [{"params": ["a"], "fused": True}]},
        {"scheduler": {"type": "LambdaLR"}},
        {"scheduler": {"type": "CosineAnnealingLR"}},
        {"scheduler": {"type": "CosineAnnealingLR", "T_max": 2.5}},
    ],
)
def test_what_cannot_be_meant_is_refused(fields):
    with pytest.raises(ValidationError):
        spec(type="SGD", **fields)


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"type": "AdamW", "betas": [0.9, 2.0]}, ("betas",)),
        ({"type": "SGD", "nesterov": True}, ("nesterov",)),
        ({"type": "Adam", "foreach": True, "fused": True}, ("fused",)),
        ({"type": "LBFGS"}, None),
        (
            {"type": "AdamW", "groups": [{"params": ["a"]}, {"params": ["b"], "betas": [2.0, 0.9]}]},
            ("groups", 1, "betas"),
        ),
        ({"type": "Adagrad", "scheduler": {"type": "CyclicLR", "base_lr": 1, "max_lr": 2}}, ("scheduler",)),
        ({"type": "SGD", "momentum": 0.9, "scheduler": {"type": "OneCycleLR", "max_lr": 1}}, ("scheduler",)),
        ({"type": "SGD", "scheduler": {"type": "CosineAnnealingWarmRestarts", "T_0": 1, "eta_min": 1.0}}, None),
    ],
)
def test_torch_refuses_at_the_argument_to_blame(fields, path):
    refused = dry_construct(spec(**fields))
    assert (refused.path if refused else None) == path


def test_the_real_shapes_are_what_torch_judges():
    assert dry_construct(spec(type="Muon"), [(2, 2), (3, 4)]) is None
    refused = dry_construct(spec(type="Muon"), [(2, 2), (3,)])
    assert isinstance(refused, Refusal)
    assert "2D" in refused.reason


def test_a_dry_construction_draws_no_random_number():
    before, python = torch.get_rng_state(), random.getstate()
    dry_construct(spec(type="SGD", momentum=0.9, scheduler={"type": "OneCycleLR", "max_lr": 1.0, "total_steps": 9}))
    assert torch.equal(before, torch.get_rng_state())
    assert python == random.getstate()


def test_a_spec_is_frozen_and_its_written_form_makes_it_again():
    main = spec(type="SGD", lr=0.5, params=["a.*"], scheduler={"type": "StepLR", "step_size": 2})
    with pytest.raises(ValidationError, match="frozen"):
        main.lr = 1.0
    assert spec(**main.written()) == main
    assert main.written() == main.resolved()
