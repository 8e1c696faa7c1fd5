from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from safeloop.evaluation import evaluate, needs_grad, preserved, wants_grad
from safeloop.seeds import rng_state, seed_everything


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("nothing", None)
        self.register_buffer("nan", torch.tensor([float("nan"), -0.0]))

    def forward(self, x):
        self.calls = self.calls + 1
        return self.net(x)


def make(modes=(True, False, True, True)):
    torch.manual_seed(0)
    model = Net()
    for module, mode in zip(model.net, modes, strict=True):
        module.training = mode
    model(torch.randn(5, 4)).sum().backward()
    model.net[3].weight.requires_grad_(False)
    model.net[0].bias.grad = None
    return model


def raw(tensor):
    return tensor.detach().clone().numpy().tobytes()


def snapshot(model):
    state = rng_state()
    return {
        "torch": state.torch.numpy().tobytes(),
        "numpy": (state.numpy[1].tobytes(), state.numpy[2:]),
        "python": state.python,
        "modes": [module.training for module in model.modules()],
        "buffers": [
            (name, id(b), None if b is None else (b._version, raw(b)))
            for module in model.modules()
            for name, b in module._buffers.items()
        ],
        "parameters": [(id(p), p.requires_grad, raw(p)) for p in model.parameters()],
        "grads": [(id(p.grad), None if p.grad is None else raw(p.grad)) for p in model.parameters()],
        "grad mode": torch.is_grad_enabled(),
    }


def unversioned(state):
    return {**state, "buffers": [(name, i, value and value[1]) for name, i, value in state["buffers"]]}


def draw_everything():
    torch.randn(3), np.random.randn(), random.random()


def train_mode(model, x):
    model.train()
    model(x)


def write_buffers(model, x):
    model.net[1].running_mean.add_(1)
    model.net[1].running_var.data.mul_(2)
    model.nan.zero_()
    model.net[1].running_var = torch.ones(3)


def resize_a_buffer(model, x):
    model.nan.resize_(7)


def add_and_remove_buffers(model, x):
    model.register_buffer("late", torch.zeros(1))
    model._buffers.pop("nan", None)
    model.nothing = torch.zeros(1)


def zero_the_gradients(model, x):
    model.zero_grad(set_to_none=False)
    model.zero_grad()


def backward(model, x):
    with torch.enable_grad():
        model(x.requires_grad_()).sum().backward()


def freeze_and_thaw(model, x):
    model.requires_grad_(not model.net[0].weight.requires_grad)


def grad_mode_on(model, x):
    torch.set_grad_enabled(True)


def grad_mode_off(model, x):
    torch.set_grad_enabled(False)


def raise_error(model, x):
    train_mode(model, x)
    write_buffers(model, x)
    raise LookupError


MISCHIEF = [
    lambda model, x: draw_everything(),
    train_mode,
    write_buffers,
    resize_a_buffer,
    add_and_remove_buffers,
    zero_the_gradients,
    backward,
    freeze_and_thaw,
    grad_mode_on,
    grad_mode_off,
    raise_error,
]


@pytest.mark.parametrize("act", MISCHIEF, ids=lambda act: act.__name__)
@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("grad_mode", [False, True])
def test_an_evaluation_leaves_everything_bitwise_as_it_was(act, wanted, grad_mode):
    model, batches = make(), [torch.randn(5, 4), torch.randn(2, 4)]

    def metrics(x):
        out = model(x)
        act(model, x)
        return {"mean": out.mean(1)}

    np.random.randn()
    with torch.set_grad_enabled(grad_mode):
        before = snapshot(model)
        try:
            evaluate(metrics, model, batches, count=len, wants_grad=wanted, seed=3)
        except LookupError:
            assert act is raise_error
        after = snapshot(model)
    assert unversioned(after) == unversioned(before)


def test_a_quiet_evaluation_writes_into_no_buffer():
    model, batch = make(), torch.randn(5, 4)
    before = snapshot(model)
    evaluate(lambda x: {"mean": model(x).mean(1)}, model, [batch], count=len)
    assert snapshot(model) == before


@settings(deadline=None, max_examples=30)
@given(modes=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()), top=st.booleans())
def test_every_mixture_of_modes_is_restored_module_by_module(modes, top):
    model = make(modes)
    model.training = top
    before = snapshot(model)["modes"]
    seen = []

    def metrics(x):
        seen.append([module.training for module in model.modules()])
        model.net[1].train()
        return {"a": x}

    evaluate(metrics, model, [torch.zeros(1)] * 2, count=len)
    assert seen == [[False] * 6] * 2
    assert snapshot(model)["modes"] == before


def test_grad_mode_that_a_metric_leaves_on_does_not_reach_the_next_batch():
    modes = []

    def metrics(x):
        modes.append(torch.is_grad_enabled())
        torch.set_grad_enabled(True)
        return {"a": x}

    evaluate(metrics, nn.Linear(1, 1), [torch.zeros(1)] * 3, count=len)
    assert modes == [False] * 3


def test_a_train_method_that_does_more_than_set_the_flag_is_undone_by_itself():
    class Adapter(nn.Linear):
        is_merged = False

        def train(self, mode=True):
            self.is_merged = not mode
            return super().train(mode)

    model = nn.Sequential(Adapter(1, 1))
    merged = []

    def metrics(x):
        merged.append(model[0].is_merged)
        return {"a": x}

    evaluate(metrics, model, [torch.zeros(1)], count=len)
    assert merged == [True]
    assert not model[0].is_merged


def test_a_metric_may_take_gradients_of_its_inputs_and_parameters_stay_out():
    model, batch = nn.Linear(3, 1), torch.ones(2, 3)
    before = snapshot(model)

    @needs_grad
    def metrics(x):
        assert not any(p.requires_grad for p in model.parameters())
        x.requires_grad_(True)
        (slope,) = torch.autograd.grad(model(x).sum(), x)
        model(x).sum().backward()
        return {"slope": slope.square().sum(1), "output": model(x)}

    assert wants_grad(metrics)
    result = evaluate(metrics, model, [batch], count=len, wants_grad=True)
    assert result["slope"] == pytest.approx(model.weight.square().sum().item(), rel=1e-6)
    assert snapshot(model) == before
    assert not batch.requires_grad
    assert batch.grad is None


def test_the_mark_of_needs_grad_is_seen_on_a_method_and_not_inherited_by_another():
    class A:
        @needs_grad
        def metrics(self, batch):
            """The mark changes nothing else."""

    class B(A):
        def metrics(self, batch):
            """Overridden without the mark."""

    assert wants_grad(A().metrics)
    assert not wants_grad(B().metrics)
    assert A.metrics.__name__ == "metrics"


def test_draws_inside_are_repeatable_with_a_seed_and_go_on_from_the_state_without():
    model = nn.Linear(1, 1)

    def run(seed):
        return evaluate(lambda x: {"noise": torch.rand(1)}, model, [0], count=len, seed=seed)

    first = run(1)
    torch.rand(1)
    assert run(1) == first
    assert run(2) != first
    seed_everything(0)
    expected = torch.rand(1).item()
    seed_everything(0)
    assert run(None)["noise"] == run(None)["noise"] == expected


def test_training_is_bitwise_the_same_with_and_without_evaluation():
    watched_batch = torch.randn(3, 4)

    def train(is_watched):
        model = make((True, True, True, True)).requires_grad_(True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(1)
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(torch.randn(6, 4)).square().mean()
            if is_watched:
                evaluate(lambda x: {"a": model(x).mean(1)}, model, [watched_batch], count=len)
            loss.backward()
            optimizer.step()
        return model.state_dict()

    for quiet, watched in zip(train(False).items(), train(True).items(), strict=True):
        if quiet[0] != "nan":
            assert quiet[0] == watched[0]
            assert torch.equal(quiet[1], watched[1])


def test_a_preserved_region_keeps_the_mode_and_restores_what_a_training_forward_changes():
    model = make((True, True, True, True))
    before = snapshot(model)
    with preserved(model):
        assert model.net[1].training
        assert all(p.grad is None for p in model.parameters())
        model(torch.randn(5, 4))
        model.eval()
        torch.set_grad_enabled(False)
    assert unversioned(snapshot(model)) == unversioned(before)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_modules_take_their_shape_inside_and_keep_initial_buffers():
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    with preserved(model):
        model(torch.randn(8, 5))
    assert model[0].weight.shape == (3, 5)
    assert torch.equal(model[1].running_mean, torch.zeros(3))
    assert torch.equal(model[1].running_var, torch.ones(3))
    assert model[1].num_batches_tracked == 0
    assert not model[1]._forward_pre_hooks


def test_buffers_that_cannot_be_compared_or_have_no_version_are_left_in_peace():
    model = nn.Module()
    model.register_buffer("sparse", torch.eye(2).to_sparse())
    model.register_buffer("expanded", torch.zeros(1).expand(4))
    model.register_buffer("meta", torch.zeros(2, device="meta"))
    with torch.inference_mode():
        model.register_buffer("inference", torch.ones(2))
    evaluate(lambda x: {"a": x}, model, [torch.zeros(1)], count=len)
    assert copy.copy(model._buffers["inference"]).sum() == 2
