from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from safeloop.checks.setup.ownership import ParameterAppearedLate, UnownedParameter
from safeloop.checks.stages import setup_faults
from safeloop.checks.views import Ownership, SetupView
from safeloop.optim.ownership import owned_by_identity, owned_by_patterns


def pair():
    return nn.ModuleDict({"gen": nn.Linear(2, 2), "disc": nn.Linear(2, 1)})


def by_patterns(model, patterns, frozen=()):
    return setup_faults(SetupView(model, owned_by_patterns(model, patterns, frozen)))


def by_identity(model, **optimizers):
    return setup_faults(SetupView(model, owned_by_identity(model, optimizers)))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def codes(faults):
    return [fault.code for fault in faults]


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        ({"main": ["*"]}, ()),
        ({"a": ["gen.*"], "b": "rest"}, ()),
        ({"a": ["gen.*"], "b": ["disc.*"]}, ()),
        ({"a": ["gen.*"]}, ("disc.*",)),
    ],
)
def test_a_parameter_with_one_owner_or_frozen_is_right(patterns, frozen):
    assert by_patterns(pair(), patterns, frozen) == []


def test_an_unowned_parameter_is_named_with_count_and_config_path():
    (fault,) = by_patterns(pair(), {"main": ["gen.*"]})
    assert (fault.code, fault.severity) == ("SL201", "error")
    assert fault.names == ("disc.weight", "disc.bias")
    assert "2 of 4 trainable parameters in no optimizer: `disc.weight`, `disc.bias`" in fault.what
    assert "`optimizers.main.params`" in fault.fix
    assert "`frozen:`" in fault.fix


def test_many_names_are_cut_after_six():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(5)))
    (fault,) = by_patterns(model, {"main": ["0.weight"]})
    assert "`2.bias`, `3.weight` and 3 more" in fault.what
    assert len(fault.names) == 9


def test_a_parameter_with_two_owners_is_named_with_both():
    (fault,) = by_patterns(pair(), {"a": ["*"], "b": ["disc.*"]})
    assert (fault.code, fault.names) == ("SL202", ("disc.weight", "disc.bias"))
    assert "optimizers `a` and `b`" in fault.where
    assert "`optimizers.a.params` and `optimizers.b.params`" in fault.fix


def test_the_wrong_network_handed_to_the_second_optimizer_is_told_as_owned_twice_first():
    model = pair()
    faults = by_identity(model, gen=sgd(model["gen"].parameters()), disc=sgd(model["gen"].parameters()))
    assert codes(faults) == ["SL202", "SL201"]
    assert "`disc.weight`, `disc.bias`: in no optimizer at all" in faults[0].what


def test_a_pattern_that_matches_nothing_suggests_the_nearest_name():
    fault, *others = by_patterns(pair(), {"a": ["dsic.*"], "b": ["gen.*"]})
    assert (fault.code, fault.names) == ("SL203", ("dsic.*",))
    assert "the nearest name is `disc" in fault.what
    assert fault.where == "`optimizers.a.params`"
    assert set(codes(others)) == {"SL205", "SL201"}


def test_a_tied_parameter_is_matched_by_any_of_its_names():
    model = pair()
    model["gen"].weight = model["disc"].weight = nn.Parameter(torch.zeros(2, 2))
    assert by_patterns(model, {"a": ["disc.weight"], "b": "rest"}) == []


def test_a_copied_model_is_told_as_a_stale_optimizer_first():
    model = pair()
    optimizer = sgd(model.parameters())
    faults = by_identity(copy.deepcopy(model), main=optimizer)
    assert codes(faults) == ["SL204", "SL201"]
    assert "4 tensors that are no parameter of the model, and none that is" in faults[0].what
    assert "the shapes are the same: a stale copy" in faults[0].what
    assert faults[0].severity == "error"


def test_a_replaced_layer_is_told_as_a_stale_optimizer_first():
    model = pair()
    optimizer = sgd(model.parameters())
    model["disc"] = nn.Linear(2, 5)
    faults = by_identity(model, main=optimizer)
    assert codes(faults) == ["SL204", "SL201"]
    assert "beside 2 parameters that are" in faults[0].what
    assert "shapes are the same" not in faults[0].what


def test_further_tensors_beside_all_parameters_are_a_warning():
    model = pair()
    (fault,) = by_identity(model, main=sgd([*model.parameters(), torch.zeros(3, requires_grad=True)]))
    assert (fault.code, fault.severity, fault.names) == ("SL204", "warning", ("main",))


def test_a_frozen_backbone_in_the_optimizer_is_right():
    model = pair()
    model["gen"].requires_grad_(False)
    assert by_identity(model, main=sgd(model.parameters())) == []


def test_a_model_that_is_frozen_as_a_whole_has_nothing_to_train():
    (fault,) = by_patterns(pair().requires_grad_(False), {"main": ["*"]})
    assert fault.code == "SL205"
    assert "4 parameters in the model, 4 frozen" in fault.what
    assert codes(by_patterns(pair(), {"main": ["*"]}, frozen=["*"])) == ["SL205"]


def test_a_model_without_parameters_has_nothing_to_train():
    assert codes(setup_faults(SetupView(nn.ReLU(), Ownership({}, empty=("main",))))) == ["SL205"]


def test_an_optimizer_left_with_nothing_is_named():
    model = pair()
    (fault,) = by_patterns(model, {"a": ["*"], "b": "rest"})
    assert (fault.code, fault.names) == ("SL205", ("b",))
    model["disc"].requires_grad_(False)
    (fault,) = by_identity(model, gen=sgd(model["gen"].parameters()), disc=sgd(model["disc"].parameters()))
    assert (fault.code, fault.names) == ("SL205", ("disc",))
    assert "requires_grad=False" in fault.why


def test_a_layer_that_a_forward_creates_is_told_as_late():
    model = pair()
    ownership = owned_by_identity(model, {"main": sgd(model.parameters())})
    view = SetupView(model, ownership)
    assert list(ParameterAppearedLate.find(view)) == []
    model["late"] = nn.Linear(2, 1)
    model["teacher"] = nn.Linear(2, 1).requires_grad_(False)
    (fault,) = ParameterAppearedLate.find(view)
    assert (fault.code, fault.names) == ("SL209", ("late.weight", "late.bias"))
    assert "`late` (Linear)" in fault.where
    (same,) = ParameterAppearedLate.find(view, frozenset({"late.weight", "late.bias", "teacher.weight"}))
    assert same == fault


def test_a_parameter_tied_from_the_start_is_not_late():
    model = pair()
    model["gen"].weight = model["disc"].weight
    view = SetupView(model, owned_by_patterns(model, {"main": ["*"]}))
    assert list(ParameterAppearedLate.find(view)) == []


def test_no_optimizer_at_all_is_not_this_check_s_business():
    assert list(UnownedParameter.find(SetupView(pair(), Ownership({}, unowned=("gen.weight",))))) == []


def test_errors_come_before_warnings():
    model = pair()
    model.blocks = [nn.Linear(2, 2)]
    optimizer = sgd([*model["gen"].parameters(), *model.blocks[0].parameters()])
    assert codes(by_identity(model, main=optimizer)) == ["SL201", "SL208"]
