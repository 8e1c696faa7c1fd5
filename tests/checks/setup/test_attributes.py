from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from safeloop.checks.setup.attributes import NonLeafAttribute, PlainTensorAttribute
from safeloop.checks.setup.containers import ModulesInPlainContainer
from safeloop.checks.stages import setup_faults
from safeloop.checks.views import SetupView
from safeloop.optim.ownership import owned_by_identity, owned_by_patterns


def view_of(model, **optimizers):
    ownership = owned_by_identity(model, optimizers) if optimizers else owned_by_patterns(model, {"main": ["*"]})
    return SetupView(model, ownership)


class Net(nn.Module):
    """Calls `make(self)` in `__init__`; its forward reads `extra`."""

    def __init__(self, extra):
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.extra = extra

    def forward(self, x):
        return self.fc(x) * self.extra


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 1))
        self._build()

    def _build(self):
        self.unit = self.w / self.w.norm()

    def forward(self, x):
        return x @ self.unit


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.state, self.last_input = nn.GRU(2, 2), None, None

    def forward(self, x):
        self.last_input = x.requires_grad_()
        y, self.state = self.rnn(x, None if self.state is None else self.state.detach())
        return y


def test_a_tensor_that_trains_but_is_no_parameter_is_an_error_with_its_line():
    (fault,) = PlainTensorAttribute.find(view_of(Net(torch.ones(2, requires_grad=True))))
    assert (fault.code, fault.severity, fault.names) == ("SL206", "error", ("extra",))
    assert "`extra` [2] requires grad but is a plain tensor" in fault.what
    assert "attribute `extra` of Net" in fault.where
    assert "test_attributes.py:" in fault.where
    assert "`self.extra = extra`" in fault.where
    assert "`self.extra = nn.Parameter(...)`" in fault.fix


def test_it_is_a_warning_when_a_ready_optimizer_holds_it():
    model = Net(torch.ones(2, requires_grad=True))
    optimizer = torch.optim.SGD([*model.parameters(), model.extra], lr=0.1)
    faults = setup_faults(view_of(model, main=optimizer))
    assert [(fault.code, fault.severity) for fault in faults] == [("SL206", "warning")]
    assert "optimizer `main` trains it, but `state_dict()` does not save it" in faults[0].why


class Alone(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.tensor(2.0, requires_grad=True)


def test_a_model_of_plain_tensors_alone_trains_when_a_ready_optimizer_holds_them():
    model = Alone()
    faults = setup_faults(view_of(model, main=torch.optim.SGD([model.w], lr=0.1)))
    assert [(fault.code, fault.severity) for fault in faults] == [("SL206", "warning")]


@pytest.mark.parametrize(
    ("container", "name"),
    [
        ([torch.ones(1), torch.ones(1, requires_grad=True)], "extra[1]"),
        ((torch.ones(1, requires_grad=True),), "extra[0]"),
        ({"a": torch.ones(1, requires_grad=True)}, "extra['a']"),
        ([nn.Parameter(torch.ones(1))], "extra[0]"),
    ],
    ids=["list", "tuple", "dict", "parameter in a list"],
)
def test_containers_are_looked_into(container, name):
    (fault,) = PlainTensorAttribute.find(view_of(Net(container)))
    assert fault.names == (name,)


def test_a_submodule_is_named_in_full():
    model = nn.Sequential(nn.Linear(2, 2), Net(torch.ones(2, requires_grad=True)))
    (fault,) = PlainTensorAttribute.find(view_of(model))
    assert fault.names == ("1.extra",)


@pytest.mark.parametrize("extra", [torch.ones(2), nn.Parameter(torch.ones(2)), None, 3.0, "x"], ids=type)
def test_constants_and_parameters_are_right(extra):
    assert setup_faults(view_of(Net(extra))) == []


def test_a_list_of_registered_parameters_is_right():
    model = Net(None)
    model.weights = list(model.fc.parameters())
    assert setup_faults(view_of(model)) == []


def test_the_result_of_an_operation_on_a_new_parameter_is_an_error_with_three_ways_out():
    (fault,) = NonLeafAttribute.find(view_of(Net(nn.Parameter(torch.ones(2)) * 0.1)))
    assert (fault.code, fault.severity, fault.names) == ("SL207", "error", ("extra",))
    assert "`extra` [2] is the result of `MulBackward0`" in fault.what
    assert "what is no parameter of the model" in fault.what
    assert "`self.extra = extra`" in fault.where
    for way in ("nn.Parameter(x * 0.1)", "with torch.no_grad(): self.extra.mul_(0.1)", "nn.Parameter(torch.full("):
        assert way in fault.fix


def test_a_value_computed_from_a_parameter_by_a_method_of_init_is_named_with_its_source():
    (fault,) = setup_faults(view_of(Normalised()))
    assert (fault.code, fault.severity) == ("SL207", "error")
    assert "from `w`" in fault.what
    assert "Normalised._build" in fault.where or "_build" in fault.where
    assert "`self.unit = self.w / self.w.norm()`" in fault.where
    assert "in `forward`" in fault.fix


def test_a_buffer_that_holds_a_graph_is_found():
    model = Net(1.0)
    model.register_buffer("start", model.fc.weight.sum())
    (fault,) = NonLeafAttribute.find(view_of(model))
    assert (fault.names, fault.severity) == (("start",), "warning")


def test_what_no_method_reads_is_a_warning():
    model = Net(1.0)
    model.initial_norm = model.fc.weight.norm()
    (fault,) = setup_faults(view_of(model))
    assert (fault.code, fault.severity) == ("SL207", "warning")


def test_a_view_of_a_parameter_follows_it_and_is_right():
    model = Net(1.0)
    model.transposed = model.fc.weight.t()
    assert setup_faults(view_of(model)) == []


def test_states_and_inputs_that_a_forward_keeps_are_right_even_after_a_forward():
    model = Remembering()
    model(torch.randn(3, 1, 2))
    assert model.state.grad_fn is not None
    assert model.last_input.requires_grad
    assert setup_faults(view_of(model)) == []


def old_weight_norm(layer):
    with pytest.warns(FutureWarning, match="weight_norm"):
        return torch.nn.utils.weight_norm(layer)


@pytest.mark.parametrize(
    "reparametrised",
    [
        lambda: old_weight_norm(nn.Linear(2, 2)),
        lambda: torch.nn.utils.spectral_norm(nn.Linear(2, 2)),
        lambda: parametrizations.weight_norm(nn.Linear(2, 2)),
        lambda: parametrizations.spectral_norm(nn.Linear(2, 2)),
        lambda: parametrizations.orthogonal(nn.Linear(2, 2)),
        lambda: prune.l1_unstructured(nn.Linear(2, 2), "weight", 1),
        lambda: nn.LSTM(2, 2),
        lambda: nn.LazyLinear(2),
        lambda: nn.MultiheadAttention(2, 1),
    ],
)
def test_layers_that_renew_their_weights_are_right(reparametrised):
    assert setup_faults(view_of(nn.Sequential(reparametrised()))) == []


def test_old_weight_norm_inside_an_lstm_is_right():
    with pytest.warns(FutureWarning, match="weight_norm"):
        layer = torch.nn.utils.weight_norm(nn.LSTM(2, 2), "weight_hh_l0")
    assert setup_faults(view_of(nn.Sequential(layer))) == []


class Dropped(nn.Module):
    """Sets a weight of its inner layer by name, before each forward: drop-connect."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.raw = nn.Parameter(self.inner.weight.detach().clone())
        del self.inner.weight
        self._set()

    def _set(self):
        setattr(self.inner, "weight", torch.dropout(self.raw, 0.5, self.training))  # noqa: B010

    def forward(self, x):
        self._set()
        return self.inner(x)


def test_a_weight_that_a_wrapper_sets_by_name_is_right():
    assert setup_faults(view_of(Dropped())) == []


@pytest.mark.parametrize(
    ("container", "right"),
    [
        ([nn.Linear(2, 2), nn.Linear(2, 2)], "nn.ModuleList"),
        ((nn.Linear(2, 2),), "nn.ModuleList"),
        ({"a": nn.Linear(2, 2)}, "nn.ModuleDict"),
        ([[nn.Linear(2, 2)], [nn.Linear(2, 2)]], "nn.ModuleList"),
    ],
    ids=["list", "tuple", "dict", "nested"],
)
def test_modules_in_a_plain_container_are_an_error(container, right):
    (fault,) = setup_faults(view_of(Net(container)))
    assert (fault.code, fault.severity, fault.names) == ("SL208", "error", ("extra",))
    assert f"self.extra = {right}(...)" in fault.fix


def test_the_container_is_described_by_kind_class_and_count():
    (fault,) = ModulesInPlainContainer.find(view_of(Net([nn.Linear(2, 2) for _ in range(3)])))
    assert "`extra` is a list of 3 modules (`Linear`), whose 6 trainable parameters are not among" in fault.what


def test_it_is_a_warning_when_a_ready_optimizer_holds_them_all():
    model = Net([nn.Linear(2, 2)])
    optimizer = torch.optim.SGD([*model.parameters(), *model.extra[0].parameters()], lr=0.1)
    faults = setup_faults(view_of(model, main=optimizer))
    assert [(fault.code, fault.severity) for fault in faults] == [("SL208", "warning")]


def test_registered_frozen_and_hidden_modules_are_right():
    model = Net(nn.ModuleList([nn.Linear(2, 2)]))
    model.again = list(model.extra)
    model.teachers = [nn.Linear(2, 2).requires_grad_(False), nn.ReLU()]
    model._hidden = [nn.Linear(2, 2)]
    assert setup_faults(view_of(model)) == []
