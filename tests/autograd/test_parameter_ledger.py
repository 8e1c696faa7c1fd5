"""What a checkpointed region reads again must be what the forward left."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from safeloop.autograd.parameter_ledger import ParameterLedger
from safeloop.autograd.recomputed import recomputed_leaves
from safeloop.autograd.saved import SavedTensorGuard
from safeloop.autograd.sites import Site
from safeloop.autograd.writes import WriteLog

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.ModuleDict({"body": nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6)), "head": nn.Linear(6, 1)})


def loss_of(net, use_reentrant):
    hidden = checkpoint(net["body"], X.clone().requires_grad_(), use_reentrant=use_reentrant)
    return net["head"](hidden).square().mean()


def data(weight):
    weight.data.mul_(3)


def numpy(weight):
    weight.detach().numpy()[:] *= 3


@torch.no_grad()
def counted(weight):
    weight.mul_(3)


def replaced(weight):
    weight.data = weight.data * 3


WRITES = {data: "values", numpy: "values", counted: "version", replaced: "storage replaced"}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_write_before_the_recomputation_spoils_the_gradient_unseen_by_the_guard_and_is_found(
    net, write, use_reentrant
):
    parameters = dict(net.named_parameters())
    loss_of(net, use_reentrant).backward()
    clean = net["body"][0].weight.grad.clone()
    net.zero_grad()
    guard, ledger = SavedTensorGuard(parameters), ParameterLedger(parameters)
    with guard:
        loss = loss_of(net, use_reentrant)
    ledger.close_forward()
    read_again = recomputed_leaves([loss])
    write(net["body"][2].weight)
    (change,) = ledger.changed(only=read_again)
    assert (change.name, change.shape, change.kind) == ("body.2.weight", (6, 6), WRITES[write])
    loss.backward()
    assert guard.findings == []
    assert not torch.allclose(net["body"][0].weight.grad, clean)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_is_not_read_again_may_change(net, use_reentrant):
    ledger = ParameterLedger(dict(net.named_parameters()))
    loss = loss_of(net, use_reentrant)
    ledger.close_forward()
    net["head"].bias.data.add_(1)
    assert ledger.changed(only=recomputed_leaves([loss])) == ()
    assert [change.name for change in ledger.changed()] == ["head.bias"]


def test_nothing_changes_by_itself(net):
    ledger = ParameterLedger({**dict(net.named_parameters()), "buffer": torch.full((3,), float("nan"))})
    ledger.close_forward()
    assert ledger.changed() == ()


def test_a_ledger_is_taken_anew(net):
    ledger = ParameterLedger(dict(net.named_parameters()))
    ledger.close_forward()
    net["head"].weight.data.add_(1)
    assert len(ledger.changed()) == 1
    ledger.close_forward()
    assert ledger.changed() == ()


def test_before_the_first_forward_nothing_has_changed(net):
    assert ParameterLedger(dict(net.named_parameters())).changed() == ()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_model_that_is_followed_closes_the_forward_itself_and_its_recomputation_does_not(net, use_reentrant):
    ledger = ParameterLedger(dict(net.named_parameters()))
    with ledger.follow(net["body"]):
        net["head"].weight.data.add_(1)  # before: part of the forward
        loss = loss_of(net, use_reentrant)
        assert ledger.is_closed
        net["body"][0].weight.data.add_(1)
        loss.backward()
    assert [change.name for change in ledger.changed()] == ["body.0.weight"]
    assert not net["body"]._forward_hooks
    ledger.open_forward()
    assert (ledger.is_closed, ledger.changed()) == (False, ())


def test_who_wrote_is_told(net):
    log = WriteLog()
    ledger = ParameterLedger(dict(net.named_parameters()), writes=log)
    log.note(net["head"].weight, "too early", None)
    ledger.close_forward()
    log.note(net["head"].weight.data, "Tensor.add_", Site("a.py", 3, "f"))
    net["head"].weight.data.add_(1)
    (change,) = ledger.changed()
    assert [write.description for write in change.written_by] == ["Tensor.add_"]


def names_of(net, leaves):
    return {name for name, parameter in net.named_parameters() if parameter in leaves}


BODY = {"body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias"}


def test_the_leaves_of_a_region_are_its_parameters_and_no_others(net):
    assert names_of(net, recomputed_leaves([loss_of(net, False)])) == BODY
    assert recomputed_leaves([net["head"](net["body"](X)).sum(), torch.ones(())]) == set()


@pytest.mark.parametrize(
    "function",
    {
        "a module": lambda body: body,
        "a method": lambda body: body.forward,
        "a partial": lambda body: functools.partial(body.forward),
        "a closure": lambda body: lambda x: body(x),
    }.values(),
)
def test_the_parameters_of_a_reentrant_region_are_found_by_its_function(net, function):
    out = checkpoint(function(net["body"]), X.clone().requires_grad_(), use_reentrant=True)
    assert names_of(net, recomputed_leaves([out.sum()])) == BODY


def test_before_the_backward_pass_the_walk_unpacks_nothing(net):
    calls = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), lambda t: calls.append(t) or t):
        loss = net["head"](checkpoint(net["body"], X, use_reentrant=False)).sum()
    recomputed_leaves([loss])
    assert calls == []


def test_inference_tensors_and_sparse_ones_have_their_entry():
    with torch.inference_mode():
        frozen = torch.ones(3)
    sparse = torch.eye(3).to_sparse()
    ledger = ParameterLedger({"frozen": frozen, "sparse": sparse})
    ledger.close_forward()
    assert ledger.changed() == ()
    sparse._values()[0] = 5
    frozen.numpy()[0] = np.float32(7)
    assert [change.name for change in ledger.changed()] == ["frozen", "sparse"]
