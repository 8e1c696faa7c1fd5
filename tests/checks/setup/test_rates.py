from __future__ import annotations

import pytest
import torch
from torch import nn

from safeloop.checks.setup.rates import LearningRatesFarApart
from safeloop.checks.views import SetupView
from safeloop.optim.ownership import owned_by_identity


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        self.head = nn.Linear(4, 1)
        self.temperature = nn.Parameter(torch.tensor(1.0))


def groups(*named_rates):
    """One parameter group for each (module, rate) pair."""
    return [{"params": list(module.parameters()), "lr": rate} for module, rate in named_rates]


def found_in(model, **optimizers):
    view = SetupView(model, owned_by_identity(model, optimizers), optimizers)
    return list(LearningRatesFarApart.find(view))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_swapped_rates_are_named_with_modules_and_rates(kind):
    model = Net()
    (fault,) = found_in(model, main=kind(groups((model.backbone, 0.5), (model.head, 1e-6))))
    assert (fault.code, fault.severity) == ("SL213", "warning")
    assert fault.what == ("the learning rates differ 5e+05 times: `backbone.0`, `backbone.1`: lr 0.5; `head`: lr 1e-06")
    assert fault.where == "group 0 of optimizer `main` and group 1 of optimizer `main`"
    assert set(fault.names) == {name for name, _ in model.named_parameters()} - {"temperature"}


def test_two_optimizers_of_one_class_are_compared():
    model = Net()
    optimizers = {
        "body": torch.optim.Adam(model.backbone.parameters(), lr=0.1),
        "head": torch.optim.Adam(model.head.parameters(), lr=1e-5),
    }
    (fault,) = found_in(model, **optimizers)
    assert "group 0 of optimizer `body` and group 0 of optimizer `head`" in fault.where


def test_a_far_too_fast_head_is_named_too():
    model = Net()
    assert found_in(model, main=torch.optim.SGD(groups((model.backbone, 1e-6), (model.head, 0.5))))


def test_a_head_that_is_slower_than_its_backbone_is_named():
    model = Net()
    assert found_in(model, main=torch.optim.AdamW(groups((model.backbone, 1e-3), (model.head, 1e-5))))
    assert found_in(model, main=torch.optim.AdamW(groups((model.backbone, 1e-3), (model.head, 1e-4)))) == []
    unnamed = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    assert found_in(unnamed, main=torch.optim.AdamW(groups((unnamed[0], 1e-3), (unnamed[1], 1e-5)))) == []


def test_a_head_that_is_a_hundred_thousand_times_faster_is_right():
    model = Net()
    assert found_in(model, main=torch.optim.Adam(groups((model.backbone, 1e-7), (model.head, 1e-2)))) == []


def test_a_tensor_rate_is_read():
    model = Net()
    rates = torch.tensor(0.5), torch.tensor(1e-6)
    assert found_in(model, main=torch.optim.Adam(groups((model.backbone, rates[0]), (model.head, rates[1]))))


def deep(num=24):
    return nn.Sequential(*(nn.Linear(2, 2) for _ in range(num)))


def layer_wise(model, decay, top=1e-3, head=None):
    rates = [top * decay ** (len(model) - 1 - depth) for depth in range(len(model))]
    if head is not None:
        rates[-1] = head
    return torch.optim.AdamW(groups(*zip(model, rates, strict=True)))


@pytest.mark.parametrize("decay", [0.95, 0.65, 0.5, 0.1, 1 / 0.65])
def test_a_decay_per_layer_is_a_ladder(decay):
    assert found_in(deep(), main=layer_wise(deep_model := deep(), decay)) == []
    assert deep_model


def test_a_decay_per_layer_with_a_new_head_is_right():
    model = deep()
    assert found_in(model, main=layer_wise(model, 0.65, top=2e-5, head=2e-2)) == []


def test_a_new_head_a_frozen_group_a_scalar_and_a_rate_of_zero_are_right():
    model = Net()
    rates = [(model.backbone, 1e-5), (model.head, 1e-1)]
    assert found_in(model, main=torch.optim.SGD(groups(*rates))) == []
    assert found_in(model, main=torch.optim.SGD(groups((model.backbone, 0.0), (model.head, 0.5)))) == []
    scalar = [*groups((model.backbone, 1e-6)), {"params": [model.temperature], "lr": 1.0}]
    assert found_in(model, main=torch.optim.SGD(scalar)) == []
    model.backbone.requires_grad_(False)
    assert found_in(model, main=torch.optim.SGD(groups((model.backbone, 1e-9), (model.head, 0.5)))) == []


def test_optimizers_of_different_classes_have_rates_of_different_scales():
    model = Net()
    optimizers = {
        "body": torch.optim.Adadelta(model.backbone.parameters(), lr=1.0),
        "head": torch.optim.Adam(model.head.parameters(), lr=1e-5),
    }
    assert found_in(model, **optimizers) == []


def test_a_warm_up_of_one_group_is_judged_by_the_rate_that_it_leads_to():
    model = Net()
    optimizer = torch.optim.SGD(groups((model.head, 0.1), (model.backbone, 0.05)))
    torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0, lambda step: 1e-7])
    assert found_in(model, main=optimizer) == []


def test_weight_decay_groups_with_one_rate_are_right():
    model = Net()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others}], lr=3e-4)
    assert found_in(model, main=optimizer) == []


def test_lazy_parameters_are_no_obstacle():
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyLinear(2))
    assert found_in(model, main=torch.optim.SGD(groups((model[0], 0.5), (model[1], 1e-6))))
