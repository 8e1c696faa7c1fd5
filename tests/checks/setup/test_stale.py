"""Every way to replace parameters behind an optimizer's back that we know, and those that replace none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import safeloop as sl
from safeloop.checks.stages import setup_faults
from safeloop.checks.views import SetupView
from safeloop.optim.ownership import owned_by_identity


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(x))


def by_index(model):
    model.body[2] = nn.Linear(4, 4)


def by_recreation(model):
    def renew(module):
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(torch.empty_like(module.weight).normal_())

    model.apply(renew)


def by_assigned_state(model):
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def by_weight_norm(model):
    parametrizations.weight_norm(model.head)


def by_old_weight_norm(model):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.head)


def by_dtype(model):
    model.head.weight = nn.Parameter(model.head.weight.double())


def by_setattr(model):
    model.head = nn.Linear(4, 3)


def by_deleting(model):
    del model.body[2]
    model.body.append(nn.Linear(4, 4))


def by_swapping_to(model):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.to(torch.float64)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


REPLACING = [by_index, by_recreation, by_assigned_state, by_weight_norm, by_old_weight_norm, by_dtype, by_setattr]
REPLACING += [by_deleting, by_swapping_to]


def judged(model, optimizer):
    return setup_faults(SetupView(model, owned_by_identity(model, {"main": optimizer}), {"main": optimizer}))


@pytest.mark.parametrize("replace", REPLACING)
def test_an_optimizer_that_holds_what_was_replaced_is_an_error_that_names_the_new_parameters(replace):
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    replace(model)
    fault, *others = judged(model, optimizer)
    held = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
    assert (fault.code, fault.severity) == ("SL204", "error")
    assert set(fault.names) == {name for name, parameter in model.named_parameters() if id(parameter) not in held}
    assert [other.code for other in others] == ["SL201"]


def test_a_deep_copy_that_is_trained_is_told_as_a_stale_copy():
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    fault, *_ = judged(copy.deepcopy(model), optimizer)
    assert "and none that is" in fault.what
    assert "a stale copy" in fault.what


def in_place_dtype(model):
    model.to(torch.float64)


def pruned(model):
    prune.l1_unstructured(model.head, "weight", 0.5)


def loaded(model):
    model.load_state_dict(Net().state_dict())


def with_swapping(model):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def frozen_after(model):
    model.body.requires_grad_(False)


def initialised(model):
    model.apply(lambda module: nn.init.zeros_(module.bias) if isinstance(module, nn.Linear) else None)


@pytest.mark.parametrize("change", [in_place_dtype, pruned, loaded, with_swapping, frozen_after, initialised])
def test_changes_that_keep_the_parameters_are_right(change):
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    change(model)
    assert judged(model, optimizer) == []


class Late(nn.Module):
    """Makes layers in its first forward, in one of several ways."""

    def __init__(self, way):
        super().__init__()
        self.first, self.blocks, self.named = nn.Linear(3, 4), nn.ModuleList(), nn.ModuleDict()
        self.way = way

    def forward(self, x):
        h = self.first(x)
        return getattr(self, self.way)(h)

    def by_attribute(self, h):
        if not hasattr(self, "out"):
            self.out = nn.Linear(h.shape[1], 1)
        return self.out(h)

    def by_list(self, h):
        if not self.blocks:
            self.blocks.append(nn.Linear(h.shape[1], 1))
        return self.blocks[0](h)

    def by_name(self, h):
        if "4" not in self.named:
            self.named["4"] = nn.Linear(h.shape[1], 1)
        return self.named["4"](h)

    def by_registering(self, h):
        if "scale" not in self._parameters:
            self.register_parameter("scale", nn.Parameter(torch.ones(h.shape[1])))
        return (h * self.scale).sum(1)


class Run(sl.Trainer):
    def loss(self, batch):
        return self.model(batch).square().mean()


@pytest.mark.parametrize(
    ("way", "name"),
    [
        ("by_attribute", "out.weight"),
        ("by_list", "blocks.0.weight"),
        ("by_name", "named.4.weight"),
        ("by_registering", "scale"),
    ],
)
@pytest.mark.parametrize("is_ready", [True, False])
def test_what_a_forward_creates_is_named(way, name, is_ready, tmp_path):
    model = Late(way)
    optimizers = torch.optim.SGD(model.parameters(), lr=0.1) if is_ready else {"type": "SGD", "lr": 0.1}
    run = {"max_steps": 2, "dir": tmp_path}
    with pytest.raises(sl.FaultError) as raised:
        Run(model=model, data=[torch.randn(8, 3)] * 2, optimizers=optimizers, run=run, log={"sinks": []}).fit()
    assert raised.value.fault.code == "SL209"
    assert name in raised.value.fault.names


def test_lazy_layers_and_a_first_call_before_the_optimizer_are_right(tmp_path):
    run = {"max_steps": 2, "dir": tmp_path}
    rest = {"data": [torch.randn(8, 3)] * 2, "run": run, "log": {"sinks": []}}
    lazy = nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(1))
    assert not Run(model=lazy, optimizers={"type": "SGD", "lr": 0.1}, **rest).fit().faults
    called = Late("by_attribute")
    called(torch.randn(8, 3))
    assert not Run(model=called, optimizers=torch.optim.SGD(called.parameters(), lr=0.1), **rest).fit().faults
