"""Torch's own errors, provoked for real: each test also pins the message that `translate` recognises."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable

import safeloop as sl
from safeloop.checks.graph.torch_errors import translate

SOURCE = "train.py:3 in Run.loss"
X = torch.ones(4, 3)


def fault_of(model, loss, source=SOURCE):
    with pytest.raises(RuntimeError) as caught:
        loss(model)
    fault = translate(caught.value, terms_source=source, model=model)
    assert fault is not None
    assert fault.severity == "error"
    return fault


class Masked(nn.Linear):
    def forward(self, x):
        self.weight.mul_(0.5)
        return super().forward(x)


def test_a_weight_masked_in_place_is_named_with_line_and_parameter():
    model = nn.Sequential(Masked(3, 3), nn.Linear(3, 1))
    fault = fault_of(model, lambda m: m(X))
    assert (fault.code, fault.names) == ("SL301", ("0.weight",))
    assert "`self.weight` (parameter `0.weight`)" in fault.what
    assert "test_torch_errors.py:" in fault.where
    assert "`self.weight.mul_(0.5)`" in fault.where
    assert "module `0` (Masked)" in fault.where
    assert SOURCE in fault.where
    assert "torch.no_grad()" in fault.fix


def summed(model):
    total = torch.tensor(0.0, requires_grad=True)
    total += model(X).sum()
    return total


def test_a_sum_that_starts_from_a_leaf_is_told_to_start_from_zero():
    fault = fault_of(nn.Linear(3, 1), summed)
    assert (fault.code, fault.names) == ("SL301", ())
    assert "`total` is a leaf" in fault.what
    assert "`total += model(X).sum()`" in fault.where
    assert "sum(terms)" in fault.fix


def test_a_view_of_a_leaf_is_one_too():
    fault = fault_of(nn.Linear(3, 1), lambda m: m.weight[0].add_(1))
    assert fault.code == "SL301"
    assert fault.names == ("weight",)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.state = nn.RNNCell(3, 2), torch.zeros(4, 2)

    def forward(self, x):
        self.state = self.cell(x, self.state)
        return self.state


def test_a_state_that_was_not_detached_is_named():
    def two_steps(model):
        for _ in range(2):
            model(X).sum().backward()

    fault = fault_of(Recurrent(), two_steps)
    assert (fault.code, fault.names) == ("SL302", ("state",))
    assert "attribute `state` of Recurrent" in fault.what
    assert "`self.state = state.detach()`" in fault.fix


def test_a_loss_that_was_differentiated_before_has_no_attribute_to_name():
    def twice(model):
        loss = model(X).square().sum()
        loss.backward()
        loss.backward()

    fault = fault_of(nn.Linear(3, 1), twice)
    assert fault.code == "SL302"
    assert "no attribute of the model keeps a graph" in fault.what


class Overwriting(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        h = torch.sigmoid(self.fc(x))
        h += x
        return h


def test_a_saved_output_that_was_overwritten_is_told_with_the_lines_that_write():
    fault = fault_of(Overwriting(), lambda m: m(X).sum().backward())
    assert fault.code == "SL303"
    assert "[4, 3] (output 0 of `Sigmoid" in fault.what
    assert "version 1, saved at 0" in fault.what
    assert "`h += x`" in fault.where


def test_modules_that_work_in_place_are_listed():
    model = nn.Sequential()
    model.add_module("fc", nn.Linear(3, 3))
    model.add_module("act", nn.ReLU(inplace=True))
    model.add_module("drop", nn.Dropout(0.5, inplace=True))
    fault = fault_of(model, lambda m: m(X).sum().backward())
    assert "modules with inplace=True: `act` (ReLU), `drop` (Dropout)" in fault.where


def test_a_batch_that_the_loss_function_writes_into_is_told_with_its_line(tmp_path):
    path = tmp_path / "user.py"
    path.write_text(
        "def loss(model, x):\n    y = model(x)\n    x.sub_(1)\n    terms = {}\n    terms['fit'] = y.sum()\n"
        "    x[0] = 0\n    terms['fit'].requires_grad_()\n    terms['fit'].backward()\n"
    )
    namespace = {}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    fault = fault_of(nn.Linear(3, 1), lambda m: namespace["loss"](m, X.clone()), f"{path}:1 in loss")
    assert fault.code == "SL303"
    assert "not the result of an operation" in fault.what
    assert fault.where.endswith(f"{path}:3 in loss: `x.sub_(1)`; {path}:6 in loss: `x[0] = 0`")


def test_an_inference_tensor_is_named_with_variable_and_module():
    with torch.inference_mode():
        batch = {"feat": torch.ones(4, 3), "y": 1}
    model = nn.Sequential()
    model.add_module("adapter", nn.Linear(3, 1))

    def loss(model):
        inputs = batch
        return model(inputs["feat"])

    fault = fault_of(model, loss)
    assert fault.code == "SL304"
    assert "`inputs['feat']`" in fault.what
    assert "module `adapter` (Linear)" in fault.what
    assert "`input`" not in fault.what


@pytest.mark.parametrize("use", [lambda x: x.add_(1), lambda x: x.requires_grad_()], ids=["write", "requires_grad"])
def test_an_inference_tensor_cannot_be_written_or_made_a_leaf(use):
    with torch.inference_mode():
        x = torch.ones(3)
    assert fault_of(nn.Linear(3, 1), lambda m: use(x)).code == "SL304"


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 1)

    def forward(self, x):
        return Square.apply(self.fc(x)) * self.fc.bias


def test_a_function_without_a_second_derivative_is_named():
    def penalty(model):
        x = X.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        slope.sum().backward()

    fault = fault_of(Critic(), penalty)
    assert fault.code == "SL305"
    assert "`Square` (in Critic.forward)" in fault.what


def score_without_graph(model):
    x = X.clone().requires_grad_()
    with torch.no_grad():
        score = model(x).sum()
    torch.autograd.grad(score, x)


def input_without_graph(model):
    x = X.clone()
    score = model(x).sum()
    torch.autograd.grad(score, x)


@pytest.mark.parametrize(("loss", "name"), [(score_without_graph, "score"), (input_without_graph, "x")])
def test_a_tensor_without_a_graph_is_named(loss, name):
    fault = fault_of(nn.Linear(3, 1), loss)
    assert fault.code == "SL306"
    assert f"on this line `{name}`" in fault.what
    assert "`torch.autograd.grad(score, x)`" in fault.where


def test_retaining_the_gradient_of_a_constant_is_one_too():
    fault = fault_of(nn.Linear(3, 1), lambda m: X.retain_grad())
    assert fault.code == "SL306"
    assert "`X`" in fault.what


def test_a_gradient_of_several_values_shows_their_shape():
    def loss(model):
        x = X.clone().requires_grad_()
        score = model(x)
        torch.autograd.grad(score, x)

    fault = fault_of(nn.Linear(3, 1), loss)
    assert fault.code == "SL307"
    assert "`score` [4, 1]" in fault.what


@pytest.mark.parametrize("message", ["CUDA out of memory", "mat1 and mat2 shapes cannot be multiplied"])
def test_an_error_that_is_not_known_stays_torch_s(message):
    assert translate(RuntimeError(message), terms_source=SOURCE, model=nn.Linear(1, 1)) is None


def test_the_users_error_is_not_taken_for_torch_s():
    def loss(model):
        raise RuntimeError("my own")

    with pytest.raises(RuntimeError, match="my own") as caught:
        loss(None)
    assert translate(caught.value, terms_source=SOURCE, model=nn.Linear(1, 1)) is None


def test_an_error_without_a_user_s_frame_tells_the_loss_function():
    error = RuntimeError("Trying to backward through the graph a second time")
    fault = translate(error, terms_source=SOURCE, model=nn.Linear(1, 1))
    assert fault is not None
    assert fault.where == f"backward pass of the loss terms of {SOURCE}; torch keeps no forward line"


class Run(sl.Trainer):
    def loss(self, batch):
        return self.model(batch).square().mean()


@pytest.mark.parametrize(
    ("model", "code", "start"),
    [
        (Overwriting(), "SL303", "saved at "),
        (nn.Sequential(Masked(3, 3)), "SL301", "{here}:"),
    ],
    ids=["backward", "forward"],
)
def test_the_script_that_started_a_run_is_never_taken_for_the_line(model, code, start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = {"max_steps": 1}
    with pytest.raises(sl.FaultError) as caught:
        Run(model=model, data=[X], optimizers={"type": "SGD", "lr": 0.1}, run=run, log={"sinks": []}).fit()
    assert caught.value.fault.code == code
    assert caught.value.fault.where.startswith(start.format(here=__file__))
    assert ".fit()" not in caught.value.fault.where
