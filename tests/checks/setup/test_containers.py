from __future__ import annotations

import functools
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from safeloop.checks.setup.attributes import PlainTensorAttribute
from safeloop.checks.setup.containers import ModulesInPlainContainer
from safeloop.checks.stages import setup_faults
from safeloop.checks.views import SetupView
from safeloop.optim.ownership import owned_by_identity, owned_by_patterns


def linear():
    return nn.Linear(2, 2)


class Net(nn.Module):
    """Its forward reads `extra`, and `later` reads `other`."""

    def __init__(self, extra=None, other=None):
        super().__init__()
        self.fc = linear()
        self.extra = extra
        self.other = other

    def forward(self, x):
        return self.fc(self._through(x))

    def _through(self, x):
        return self.extra(x)

    def later(self, x):
        return self.other(x)


class Tower:
    """Forgot to be a module."""

    def __init__(self):
        self.fc = linear()

    def __call__(self, x):
        return self.fc(x)


@dataclass
class Parts:
    first: nn.Module = field(default_factory=linear)
    rest: list = field(default_factory=lambda: [linear()])


@dataclass
class Weights:
    scale: torch.Tensor = field(default_factory=lambda: nn.Parameter(torch.ones(2)))
    more: list = field(default_factory=lambda: [nn.Parameter(torch.ones(2))])


@dataclass(slots=True)
class Slotted:
    inner: nn.Module = field(default_factory=linear)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.steps = [self.make() for _ in range(2)]

    def make(self):
        return linear()


class Child(Base):
    def __init__(self):
        super().__init__()
        self.out = linear()


def closure():
    inner = linear()
    return lambda x: inner(x)


def loop_closures():
    def make():
        inner = linear()
        return lambda x: inner(x).relu()

    return [make() for _ in range(2)]


def default_argument():
    layer = linear()
    return lambda x, inner=layer: inner(x)


def call(module, x):
    return module(x)


def view_of(model, **optimizers):
    ownership = owned_by_identity(model, optimizers) if optimizers else owned_by_patterns(model, {"main": ["*"]})
    return SetupView(model, ownership)


def paths_in(model, **optimizers):
    return [fault.names[0] for fault in ModulesInPlainContainer.find(view_of(model, **optimizers))]


@pytest.mark.parametrize(
    "container",
    [
        lambda: [linear()],
        lambda: (linear(), linear()),
        lambda: {"a": linear()},
        lambda: OrderedDict(a=linear()),
        lambda: {"a": {"b": [linear()]}},
        lambda: [[linear(), linear()], [linear()]],
        lambda: [(3, linear()), (1, linear())],
        lambda: deque([linear(), linear()]),
        lambda: {linear(), linear()},
        lambda: list(nn.ModuleList([linear()])),
        lambda: [*nn.Sequential(linear(), linear())],
        lambda: dict(nn.ModuleDict({"a": linear()}).items()),
    ],
)
def test_modules_in_every_kind_of_container_are_found(container):
    assert paths_in(Net(container())) == ["extra"]


def test_a_list_that_a_parent_class_makes_is_found():
    assert paths_in(Child()) == ["steps"]
    assert paths_in(nn.Sequential(linear(), Child())) == ["1.steps"]


@pytest.mark.parametrize(
    ("holder", "kind"),
    [
        (Tower, "an object of class Tower, no nn.Module"),
        (Parts, "an object of class Parts, no nn.Module"),
        (Slotted, "an object of class Slotted, no nn.Module"),
        (closure, "a function"),
        (default_argument, "a function"),
        (lambda: functools.partial(call, linear()), "a partial"),
        (lambda: functools.partial(lambda x, module: module(x), module=linear()), "a partial"),
        (lambda: linear().forward, "a method"),
        (lambda: Tower().__call__, "a method"),
        (lambda: functools.partial(closure(), 1), "a partial"),
    ],
)
def test_modules_that_an_object_or_a_function_keeps_are_found(holder, kind):
    (fault,) = ModulesInPlainContainer.find(view_of(Net(holder())))
    assert (fault.code, fault.severity, fault.names) == ("SL208", "error", ("extra",))
    assert fault.what.startswith(f"`extra` is {kind}, which keeps ")
    assert "trainable parameters are not among the model's" in fault.what


def test_parameters_that_a_dataclass_or_nested_lists_keep_are_found():
    faults = list(PlainTensorAttribute.find(view_of(Net(Weights()))))
    assert [fault.names for fault in faults] == [("extra.scale",), ("extra.more[0]",)]
    nested = [{"w": [nn.Parameter(torch.ones(2))]}, (nn.Parameter(torch.ones(2)),)]
    faults = list(PlainTensorAttribute.find(view_of(Net(nested))))
    assert [fault.names for fault in faults] == [("extra[0]['w'][0]",), ("extra[1][0]",)]


def referring():
    model = Net()
    model.layers = nn.ModuleList([linear(), linear()])
    model.order = [model.layers[1], model.layers[0]]
    model.by_name = {"fc": model.fc}
    model.extra = lambda x: model.fc(x)
    model.apply_fc = functools.partial(call, model.fc)
    model.run = model.fc.forward
    return model


class Trainer:
    """Knows the model, and a critic of its own."""

    def __init__(self, model):
        self.model, self.critic = model, linear()


class Agent:
    def __init__(self):
        self.net = linear()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)


def trained_by_a_trainer():
    model = Net()
    model.extra = Trainer(model)
    return model


def frozen():
    return linear().requires_grad_(False)


def perceptual():
    class Distance:
        def __init__(self):
            self.vgg = linear().eval()

    return Net(Distance())


@pytest.mark.parametrize(
    "make",
    [
        referring,
        trained_by_a_trainer,
        perceptual,
        lambda: Net(Agent()),
        lambda: Net([frozen()]),
        lambda: Net(SimpleNamespace(rate=0.1)),
        lambda: Net((lambda teacher: lambda x: teacher(x))(frozen())),
        lambda: Net(torch.relu),
        lambda: Net(functools.partial(torch.softmax, dim=1)),
        lambda: Net(nn.functional.relu),
        lambda: Net([torch.ones(3), [torch.zeros(2)]]),
        lambda: Net({"mean": torch.ones(3), "name": "x"}),
        lambda: Net(nn.ParameterList([torch.ones(2), torch.ones(2)])[:1]),
        lambda: Net(other=Tower()),
        lambda: Net(dataclass(type("Config", (), {"__annotations__": {"width": int}, "width": 3}))()),
        lambda: Net([lambda x: x]),
        lambda: nn.ModuleDict({"a": linear()}),
    ],
)
def test_references_frozen_helpers_settings_and_what_forward_does_not_read_are_right(make):
    assert setup_faults(view_of(make())) == []


@pytest.mark.parametrize(
    "name", ["_net", "teacher", "target_net", "ema", "criterion", "discriminator", "perceptual_loss"]
)
def test_one_module_hidden_under_the_name_of_what_is_kept_out_is_right(name):
    model = Net()
    setattr(model, name, [linear()])
    assert setup_faults(view_of(model)) == []


def test_a_helper_that_an_optimizer_trains_is_kept_out_on_purpose():
    tower = Tower()
    model = Net(tower)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other = torch.optim.SGD(tower.fc.parameters(), lr=0.1)
    assert paths_in(model, main=optimizer, tower=other) == []


def test_a_cell_that_is_not_bound_yet_is_no_obstacle():
    def late():
        def inner(x):
            return module(x)

        yield inner
        module = linear()
        yield module

    makes = late()
    model = Net(next(makes))
    assert setup_faults(view_of(model)) == []


class Caching(nn.Module):
    """Fills containers while it runs."""

    def __init__(self):
        super().__init__()
        self.fc, self.key = linear(), "x"
        self.by_key, self.seen, self.window = {}, [], deque(maxlen=2)

    def forward(self, x):
        self.by_key[self.key] = x
        self.seen.append(x)
        self._keep(x)
        return self.fc(x)

    def _keep(self, x):
        self.window.append((x, self.fc(x)))


def test_what_a_forward_puts_into_containers_is_a_cache():
    model = Caching()
    model(torch.randn(2, 2, requires_grad=True))
    assert setup_faults(view_of(model)) == []


class Scales(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.scales = linear(), []
        for _ in range(2):
            self.scales.append(torch.ones(2, requires_grad=True))

    def forward(self, x):
        return self.fc(x) * self.scales[0] * self.scales[1]


def test_what_the_constructor_puts_into_containers_is_none():
    assert [fault.names for fault in PlainTensorAttribute.find(view_of(Scales()))] == [("scales[0]",), ("scales[1]",)]
