"""SL308 and SL309: how a change becomes a fault, and the examples of their pages in a plain loop."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

from safeloop.autograd.parameter_ledger import ParameterLedger
from safeloop.autograd.recomputed import recomputed_leaves
from safeloop.autograd.saved import SavedTensorGuard
from safeloop.autograd.sites import Site
from safeloop.autograd.writes import WriteLog
from safeloop.checks.explain import page
from safeloop.checks.graph.torch_errors import translate
from safeloop.checks.graph.unseen import ParameterChangedUnseen, SavedTensorChangedUnseen
from safeloop.checks.source import where_defined


class Net(nn.Module):
    def __init__(self, write):
        super().__init__()
        self.fc, self.out, self.write = nn.Linear(4, 4), nn.Linear(4, 1), write

    def forward(self, x):
        h = torch.sigmoid(self.fc(x))
        if self.write == "data":
            h.data.mul_(0.5)
        if self.write == "counted":
            h += x
        self.out.weight.data = self.out.weight.data
        return self.out(h)


def guarded(model, change=lambda: None, writes=None):
    guard = SavedTensorGuard(dict(model.named_parameters()), writes=writes)
    with guard:
        loss = model(torch.randn(8, 4)).square().mean()
    change()
    loss.backward()
    return guard.verify()


def faults_of(model, changes):
    return list(
        SavedTensorChangedUnseen.find(changes, model=model, terms_source=where_defined(Net.forward), where="step 7")
    )


def test_a_fault_names_the_tensor_the_operation_and_both_lines():
    model = Net("data")
    (fault,) = faults_of(model, guarded(model))
    assert (fault.code, fault.severity, fault.names) == ("SL308", "error", ())
    assert "a tensor of shape [8, 4] (float32), saved for `SigmoidBackward0` (its `result`), holds other" in fault.what
    assert "saved at" in fault.where
    assert "`h = torch.sigmoid(self.fc(x))`" in fault.where
    assert fault.where.endswith("step 7")
    suspected = fault.where.split("lines that write in place: ")[1]
    assert suspected.index("`h.data.mul_(0.5)`") < suspected.index("`h += x`"), "those that are not counted come first"
    assert "`self.out.weight.data = self.out.weight.data`" in suspected


def test_a_write_that_was_noted_is_told_in_place_of_the_suspects():
    model, log = Net(""), WriteLog()

    def change():
        log.note(model.out.weight, "Adam.step (fused)", Site(__file__, 3, "train"))
        model.out.weight.data.add_(1)

    def scaled(x):
        return Net.forward(model, x) * model.out.weight.sum() * model.out.weight

    model.forward = scaled
    faults = faults_of(model, guarded(model, change, log))
    assert [fault.names for fault in faults] == [("out.weight",)]
    assert "parameter `out.weight`, saved for `AddmmBackward0` (its `mat2`), `MulBackward0`" in faults[0].what
    assert "written by Adam.step (fused) at" in faults[0].where
    assert "lines that write" not in faults[0].where
    assert "after the backward pass" in faults[0].fix


def test_several_operations_that_saved_one_tensor_make_one_fault():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())
    guard = SavedTensorGuard()
    with guard:
        h = model(torch.randn(8, 4))
        loss = (h.exp() + h * h).sum()
    h.data.mul_(0.5)
    loss.backward()
    assert len(guard.findings) > 2
    (fault,) = faults_of(model, guard.findings)
    assert "`SigmoidBackward0` (its `result`), `MulBackward0`" in fault.what


def test_replaced_memory_is_told_as_such():
    scale = nn.Parameter(torch.ones(4))
    model = nn.Module()
    model.scale = scale
    model.forward = lambda x: x * scale
    first = nn.Linear(4, 4)
    guard = SavedTensorGuard({"scale": scale})
    with guard:
        loss = (first(torch.randn(2, 4)) * scale).sum()
    scale.data = torch.zeros(4)
    loss.backward()
    (fault,) = faults_of(model, guard.findings)
    assert (
        fault.what
        == "parameter `scale`, saved for `MulBackward0` (its `other`), has got other memory since (`.data = ...`)"
    )
    assert fault.names == ("scale",)


def test_a_counted_write_is_left_to_sl303_which_then_knows_both_lines():
    model, log = Net("counted"), WriteLog()
    guard = SavedTensorGuard(dict(model.named_parameters()), writes=log)
    with guard:
        loss = model(torch.randn(8, 4)).square().mean()
    with pytest.raises(RuntimeError) as caught:
        loss.backward()
    assert faults_of(model, guard.findings) == []
    fault = translate(caught.value, terms_source="train.py:3 in Run.loss", model=model)
    assert fault.code == "SL303"
    assert "saved for `SigmoidBackward0` (its `result`)" in fault.what
    assert "`h = torch.sigmoid(self.fc(x))`" in fault.where
    assert "`h += x`" in fault.where
    assert "torch keeps no forward line" not in fault.where


def test_no_change_is_no_fault():
    model = Net("")
    assert faults_of(model, guarded(model)) == []
    assert list(ParameterChangedUnseen.find((), model=model)) == []


def test_changed_parameters_make_one_fault_with_their_names():
    model, log = nn.Linear(3, 2), WriteLog()
    ledger = ParameterLedger(dict(model.named_parameters()), writes=log)
    ledger.close_forward()
    log.note(model.weight, "Tensor.add_", Site(__file__, 1, "f"))
    model.weight.data.add_(1)
    model.bias.data = torch.zeros(2)
    (fault,) = ParameterChangedUnseen.find(ledger.changed(), model=model, where="step 7")
    assert (fault.code, fault.names) == ("SL309", ("weight", "bias"))
    assert "`weight` [2, 3] (values differ, no write was counted), `bias` [2] (its memory was replaced)" in fault.what
    assert "written by Tensor.add_ at" in fault.where


class PlainTrainer:
    """The page's `sl.Trainer`, as a plain loop under the guard."""

    def __init__(self, model, data, optimizers, run):
        self.model, self.data = model, data

    def fit(self):
        parameters = dict(self.model.named_parameters())
        guard, ledger = SavedTensorGuard(parameters), ParameterLedger(parameters)
        faults = []
        for batch in self.data:
            with guard, ledger.follow(self.model):
                loss = self.loss(batch)
            read_again = recomputed_leaves([loss])
            faults += ParameterChangedUnseen.find(ledger.changed(only=read_again), model=self.model)
            loss.backward()
            faults += SavedTensorChangedUnseen.find(
                guard.verify(), model=self.model, terms_source=where_defined(self.loss)
            )
        return faults


def faults_of_example(text):
    torch.manual_seed(0)
    scope = {"torch": torch, "nn": nn, "sl": types.SimpleNamespace(Trainer=PlainTrainer)}
    *lines, last = text.strip().splitlines()
    exec("\n".join([*lines, f"faults = {last}"]), scope)
    return [fault.code for fault in scope["faults"]]


@pytest.mark.parametrize("code", ["SL308", "SL309"])
def test_the_examples_of_the_page_in_a_plain_loop(code):
    assert faults_of_example(page(code).bad.text) == [code]
    assert faults_of_example(page(code).good.text) == []
