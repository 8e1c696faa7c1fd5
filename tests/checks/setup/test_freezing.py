from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from safeloop.checks.setup.freezing import FreezeWithoutEffect
from safeloop.checks.stages import setup_faults
from safeloop.checks.views import SetupView
from safeloop.optim.ownership import owned_by_identity, owned_by_patterns


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3))
        self.head = nn.Linear(3, 1)

    def forward(self, x):
        return self.head(self.backbone(x).mean(-1))


def found_in(model, frozen=()):
    return list(FreezeWithoutEffect.find(SetupView(model, owned_by_patterns(model, {"main": ["*"]}, frozen))))


def test_a_dead_attribute_of_a_module_is_named_with_the_parameters_that_train():
    model = Net()
    model.backbone.requires_grad = False
    (fault,) = found_in(model)
    assert (fault.code, fault.severity) == ("SL210", "warning")
    assert fault.what.startswith("`backbone.requires_grad = False`, yet 4 parameters of it train: `backbone.0.weight`")
    assert fault.names == ("backbone", "backbone.0.weight", "backbone.0.bias", "backbone.1.weight", "backbone.1.bias")
    assert "`backbone.requires_grad_(False)`" in fault.fix


def test_each_child_frozen_in_a_loop_is_named():
    model = Net()
    for child in model.backbone.children():
        child.requires_grad = False
    assert [fault.names[0] for fault in found_in(model)] == ["backbone.0", "backbone.1"]


@pytest.mark.parametrize(
    "typo",
    [
        "require_grad",
        "required_grad",
        "requires_gard",
        "requiresGrad",
        "require_grads",
        "requires_grads",
        "reqires_grad",
        "requieres_grad",
        "requires_gradient",
        "requires_grad_",
        "requires_gradd",
        "trainable",
        "requries_grad",
    ],
)
def test_a_misspelled_switch_on_parameters_is_one_fault_that_names_them(typo):
    model = Net()
    for parameter in model.backbone.parameters():
        setattr(parameter, typo, False)
    (fault,) = found_in(model)
    assert f"`{typo} = False` was set on 4 parameters that train: `backbone.0.weight`" in fault.what


@pytest.mark.parametrize("typo", ["require_grad", "requires_grad_", "requiers_grad", "trainable"])
def test_a_misspelled_switch_on_a_module_is_named(typo):
    model = Net()
    model.head.__dict__[typo] = False
    assert [fault.names for fault in found_in(model)] == [("head", "head.weight", "head.bias")]


def test_unfreezing_that_unfreezes_nothing_is_named():
    model = Net().requires_grad_(False)
    model.head.requires_grad_(True)
    model.backbone[1].requires_grad = True
    (fault,) = found_in(model)
    assert "`backbone.1.requires_grad = True`, yet 2 parameters of it do not train" in fault.what


class Extractor(nn.Module):
    """`requires_grad` is an argument of its own, which its forward reads."""

    def __init__(self, requires_grad=False):
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.requires_grad = requires_grad

    def forward(self, x):
        with torch.set_grad_enabled(self.requires_grad):
            return self.fc(x)


class Switching(nn.Module):
    """The parent reads the child's flag."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Linear(2, 2), nn.Linear(2, 1)
        self.encoder.requires_grad = False

    def forward(self, x):
        h = self.encoder(x)
        return self.head(h if self.encoder.requires_grad else h.detach())


class Settings(nn.Module):
    """Keras words as settings of a class."""

    def __init__(self):
        super().__init__()
        self.trainable, self.requires_gradient, self.require_grad = False, False, False
        self.fc = nn.Linear(2, 2)


class WithProperty(nn.Linear):
    @property
    def requires_grad(self):
        return self.weight.requires_grad

    @requires_grad.setter
    def requires_grad(self, value):
        self.requires_grad_(value)


def attributes_of_libraries():
    model = Net()
    model.require_backward_grad_sync = False
    model._require_grads_hook = False
    for parameter in model.parameters():
        parameter.tensor_model_parallel = False
        parameter.allreduce = False
        parameter.is_embedding_or_output_parameter = False
        parameter._no_weight_decay = True
        parameter.grad_added_to_main_grad = False
    return model


def frozen_twice():
    model = Net()
    model.backbone.requires_grad = False
    model.backbone.requires_grad_(False)
    return model


def with_property():
    model = nn.Sequential(WithProperty(2, 2), nn.Linear(2, 1))
    model[0].requires_grad = False
    return model


def right_way():
    model = Net()
    for parameter in model.backbone.parameters():
        parameter.requires_grad = False
    return model


@pytest.mark.parametrize(
    "make",
    [
        Net,
        Extractor,
        Switching,
        Settings,
        attributes_of_libraries,
        frozen_twice,
        with_property,
        right_way,
        lambda: copy.deepcopy(right_way()),
        lambda: nn.Sequential(nn.ReLU()),
        lambda: Extractor(requires_grad=True),
    ],
)
def test_settings_marks_of_libraries_and_real_freezing_are_right(make):
    assert found_in(make()) == []


def test_what_the_config_freezes_is_frozen():
    model = Net()
    model.backbone.requires_grad = False
    for parameter in model.backbone.parameters():
        parameter.require_grad = False
    assert found_in(model, frozen=["backbone.*"]) == []


def test_a_mark_that_keeps_parameters_out_of_the_optimizer_is_left_to_the_ownership():
    model = Net()
    for parameter in model.backbone.parameters():
        parameter.trainable = False
    optimizer = torch.optim.SGD([p for p in model.parameters() if getattr(p, "trainable", True)], lr=0.1)
    faults = setup_faults(SetupView(model, owned_by_identity(model, {"main": optimizer})))
    assert [fault.code for fault in faults] == ["SL201"]


def test_a_tied_parameter_is_judged_by_the_parameter():
    model = nn.ModuleDict({"emb": nn.Embedding(4, 3), "out": nn.Linear(3, 4, bias=False)})
    model["out"].weight = model["emb"].weight
    model["out"].requires_grad = False
    assert [fault.names for fault in found_in(model)] == [("out", "out.weight")]
