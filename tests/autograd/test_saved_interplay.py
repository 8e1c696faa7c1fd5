"""The guard beside what else uses saved tensors: hooks, checkpointing, higher derivatives, transforms, compilers."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import graph
from torch.utils.checkpoint import checkpoint

from safeloop.autograd.saved import SavedTensorGuard

LEVELS = pytest.mark.parametrize("level", ["version", "checksum"])


def model_and_input():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6)), torch.randn(4, 6)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


class Handle:
    """Something to refer to weakly, put into the metadata of a node."""


@LEVELS
@pytest.mark.parametrize("is_used", [False, True])
def test_no_graph_outlives_its_loss(level, is_used):
    gc.collect()
    gc.disable()
    try:
        guard = SavedTensorGuard(level=level)
        x = torch.randn(100, requires_grad=True)
        with guard:
            y = x.exp()
            loss = (y * y).sum()
        handles = []
        for tensor in (y, loss):
            handle = Handle()
            tensor.grad_fn.metadata["handle"] = handle
            handles.append(weakref.ref(handle))
        if is_used:
            y.data.mul_(2)
            loss.backward()
        del handle, tensor, y, loss
        assert [ref() for ref in handles] == [None, None]
    finally:
        gc.enable()


def test_a_saved_tensor_is_let_go_by_the_backward_pass():
    guard = SavedTensorGuard()
    x = torch.randn(100, requires_grad=True)
    with guard:
        loss = (x * 2).exp().sum()
    inner = weakref.ref(loss.grad_fn.next_functions[0][0]._saved_result.untyped_storage())
    kept = []
    guard._checked.clear()
    loss.backward()
    gc.collect()
    assert kept == []
    assert inner() is None


def test_watching_changes_no_gradient_and_no_random_state():
    results = []
    for guard in (None, SavedTensorGuard(), SavedTensorGuard(level="version")):
        model, x = model_and_input()
        model.insert(1, nn.Dropout(0.3))
        if guard is None:
            loss = model(x).square().mean()
        else:
            with guard:
                loss = model(x).square().mean()
            assert guard.findings == []
        results.append([*gradients(model, loss), torch.get_rng_state()])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@LEVELS
def test_a_second_derivative_is_the_same_and_a_write_before_it_is_found(level):
    def second(guard, write=lambda y: None):
        x = torch.linspace(-1, 1, 5, dtype=torch.float64).requires_grad_()
        with guard or torch.enable_grad():
            y = x.exp()
            (slope,) = torch.autograd.grad((y * x.sin()).sum(), x, create_graph=True)
        write(y)
        (curvature,) = torch.autograd.grad(slope.sum(), x)
        return curvature

    guard = SavedTensorGuard(level=level)
    assert torch.equal(second(None), second(guard))
    assert guard.findings == []
    second(guard, lambda y: y.data.mul_(2))
    assert bool(guard.findings) == (level == "checksum")


@LEVELS
def test_two_backward_passes_over_one_graph_are_quiet(level):
    model, x = model_and_input()
    guard = SavedTensorGuard(level=level)
    with guard:
        loss = model(x).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
    assert guard.findings == []


@LEVELS
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("is_on_in_backward", [False, True])
def test_checkpointing_gives_the_same_gradients_and_no_finding(level, use_reentrant, is_on_in_backward):
    model, x = model_and_input()
    x.requires_grad_()

    def loss():
        return checkpoint(model, model(x), use_reentrant=use_reentrant).square().mean()

    expected = gradients(model, loss())
    guard = SavedTensorGuard(level=level)
    guard.start()
    made = loss()
    if not is_on_in_backward:
        guard.stop()
    assert all(map(torch.equal, gradients(model, made), expected))
    assert guard.stop() == ()
    assert graph.disable_saved_tensors_hooks.__module__ == "torch.autograd.graph"


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_an_input_of_a_checkpointed_region_is_watched(use_reentrant):
    model, x = model_and_input()
    guard = SavedTensorGuard()
    with guard:
        hidden = model(x)
        loss = checkpoint(model, hidden, use_reentrant=use_reentrant).square().mean()
    hidden.data.mul_(2)
    loss.backward()
    assert guard.findings


def test_hooks_that_the_user_pushes_inside_come_first():
    model, x = model_and_input()
    expected = gradients(model, model(x).square().mean())
    guard = SavedTensorGuard()
    with guard:
        with graph.save_on_cpu():
            hidden = model[1](model[0](x))
        loss = model[2](hidden).square().mean()
    assert all(map(torch.equal, gradients(model, loss), expected))
    assert guard.findings == []


def test_hooks_of_the_user_around_it_stay_and_the_guard_stands_aside():
    model, x = model_and_input()
    packed = []
    guard = SavedTensorGuard()
    with graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t.detach(), lambda t: t):
        with guard:
            assert not guard.is_active
            loss = model(x).square().mean()
        assert graph.disable_saved_tensors_hooks.__module__ == "torch.autograd.graph"
        num_packed = len(packed)
        model(x).sum()
    assert num_packed > 0
    assert len(packed) > num_packed, "the user's own hooks are gone"
    loss.backward()
    assert guard.findings == []


def test_stopping_inside_of_the_users_hooks_leaves_them_there():
    packed = []
    x = torch.randn(3, requires_grad=True)
    guard = SavedTensorGuard()
    guard.start()
    with graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t.detach(), lambda t: t):
        guard.stop()
        x.exp()
        assert packed
    y = x.exp()
    assert len(packed) == 1
    assert torch.equal(y.grad_fn._saved_result, y)


def test_starting_and_stopping_twice_is_once():
    guard = SavedTensorGuard()
    guard.start()
    guard.start()
    guard.stop()
    guard.stop()
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_all_is_undone_after_an_exception():
    before = graph.disable_saved_tensors_hooks
    with pytest.raises(ZeroDivisionError), SavedTensorGuard():
        assert graph.disable_saved_tensors_hooks is not before
        raise ZeroDivisionError
    assert graph.disable_saved_tensors_hooks is before
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_guards_of_two_threads_leave_torch_as_it_was():
    before = graph.disable_saved_tensors_hooks
    inside, leave = threading.Event(), threading.Event()

    def other():
        with SavedTensorGuard():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with SavedTensorGuard():
        thread.start()
        inside.wait(10)
    assert graph.disable_saved_tensors_hooks is not before
    leave.set()
    thread.join()
    assert graph.disable_saved_tensors_hooks is before


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda t: f(t).sum())(x).sum(),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x).sum(),
    "hessian": lambda f, x: torch.func.hessian(lambda t: f(t).sum())(x).sum(),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones(5))[0].sum(),
    "vmap": lambda f, x: torch.func.vmap(f)(x.expand(2, 5)).sum(),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda t: f(t).sum()))(x.expand(2, 5)).sum(),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones(5),))[1].sum(),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x).sum(),
    "jacobian": lambda f, x: torch.autograd.functional.jacobian(f, x, create_graph=True).sum(),
    "batched": lambda f, x: torch.autograd.functional.jacobian(f, x, create_graph=True, vectorize=True).sum(),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@LEVELS
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_run_and_give_the_same_gradients(transform, level):
    def run(guard):
        x = torch.linspace(-1, 1, 5, dtype=torch.float64).requires_grad_()
        with guard or torch.enable_grad():
            y = TRANSFORMS[transform](lambda t: t.exp() * t.sin() * x, x) + (x.exp() * x).sum()
        y.backward()
        return x.grad

    guard = SavedTensorGuard(level=level)
    assert torch.equal(run(guard), run(None))
    assert guard.findings == []


def test_after_a_transform_the_guard_watches_on():
    x = torch.randn(3, requires_grad=True)
    guard = SavedTensorGuard()
    with guard:
        torch.func.grad(lambda t: t.exp().sum())(x)
        y = x.exp()
    y.data.mul_(2)
    y.sum().backward()
    assert len(guard.findings) == 1


def test_under_hooks_of_the_user_a_transform_still_refuses_as_without_the_guard():
    with SavedTensorGuard(), graph.save_on_cpu(), pytest.raises(RuntimeError, match="saved tensor hooks"):
        torch.func.grad(lambda t: t.exp().sum())(torch.ones(3))


def test_autocast_is_quiet_and_the_same():
    model, x = model_and_input()

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float().square().mean()

    expected = gradients(model, loss())
    guard = SavedTensorGuard()
    with guard:
        made = loss()
    assert all(map(torch.equal, gradients(model, made), expected))
    assert guard.findings == []


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore")
def test_what_a_compiled_model_saves_is_watched(backend):
    torch._dynamo.reset()
    model, x = model_and_input()
    expected = gradients(model, model(x).square().mean())
    compiled = torch.compile(model, backend=backend)
    guard = SavedTensorGuard(dict(model.named_parameters()))
    for _ in range(2):
        with guard:
            loss = compiled(x).square().mean()
        for actual, wanted in zip(gradients(model, loss), expected, strict=True):
            torch.testing.assert_close(actual, wanted)
    assert guard.findings == []
    with guard:
        loss = compiled(x).square().mean()
    model[2].weight.data.add_(1)
    loss.backward()
    assert "2.weight" in {change.parameter for change in guard.findings}
    torch._dynamo.reset()


def test_a_subclass_and_a_nested_tensor_pass_through():
    class Own(torch.Tensor):
        pass

    guard = SavedTensorGuard()
    x = torch.randn(3, requires_grad=True)
    with guard:
        loss = x.as_subclass(Own).exp().sum()
    loss.backward()
    assert guard.findings == []
    assert x.grad.shape == (3,)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_random_graphs_have_bitwise_the_same_gradients_and_no_finding(draw_graph, data):
    make = draw_graph(data)
    guard = SavedTensorGuard()
    plain = make()
    with guard:
        watched = make()
    for made in (plain, watched):
        torch.autograd.backward(
            [t for t in made.terms if t.requires_grad],
            [s for t, s in zip(made.terms, made.seeds, strict=True) if t.requires_grad],
        )
    for expected, actual in zip(plain.grads(), watched.grads(), strict=True):
        assert (expected is None) == (actual is None)
        assert expected is None or torch.equal(expected, actual)
    assert guard.findings == []


def test_watching_a_random_graph_that_torch_refuses_raises_the_same():
    x = torch.randn(3, requires_grad=True)
    with SavedTensorGuard():
        loss = x.exp().sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
