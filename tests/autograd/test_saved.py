"""Every way to write into a saved tensor, and what the guard makes of it."""

from __future__ import annotations

import linecache
import re

import numpy as np
import pytest
import torch
from torch import nn

from safeloop.autograd.saved import SavedTensorGuard
from safeloop.autograd.sites import Site
from safeloop.autograd.writes import WriteLog


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return x * self.by


class Scene:
    """A forward whose pieces a test may write to before the backward pass: x, first, h, last, scale, y, loss."""

    def __init__(self, guard=None):
        torch.manual_seed(0)
        self.model = nn.ModuleDict({"first": nn.Linear(8, 8), "last": nn.Linear(8, 8), "scale": Scale()})
        self.x = torch.randn(4, 8)
        self.first, self.last = self.model["first"], self.model["last"]
        if guard is None:
            self.forward()
        else:
            guard._names._parameters = dict(self.model.named_parameters())
            with guard:
                self.forward()

    def forward(self):
        self.h = self.first(self.x).sigmoid()
        self.y = self.model["scale"](self.last(self.h))
        self.loss = (self.y * self.y).sum()

    def gradients(self):
        self.loss.backward()
        return [p.grad.clone() for p in self.model.parameters()]


@torch.no_grad()
def counted(scene):
    scene.h.mul_(2)


def detached(scene):
    scene.h.detach().mul_(2)


@torch.no_grad()
def counted_copy(scene):
    scene.last.weight.copy_(torch.ones(8, 8))


def set_(scene):
    scene.x.set_(torch.zeros(4, 8))


@torch.no_grad()
def output_of_a_view(scene):
    scene.h[1:].zero_()


@torch.no_grad()
def foreach(scene):
    torch._foreach_mul_([scene.last.weight, scene.first.weight], 2.0)


def inference_mode(scene):
    with torch.inference_mode():
        scene.h.mul_(2)


COUNTED = [counted, detached, counted_copy, set_, output_of_a_view, foreach, inference_mode]


def data(scene):
    scene.h.data.mul_(2)


def data_of_a_view(scene):
    scene.h[1:3].data.zero_()


def view_of_data(scene):
    scene.h.data[1:3, ::2] = 0.0


def data_of_a_weight(scene):
    scene.model["scale"].by.data.add_(1)


def foreach_on_data(scene):
    torch._foreach_add_([scene.last.weight.data], 1.0)


def new_data_of_a_weight(scene):
    scene.model["scale"].by.data = torch.full((8,), 3.0)


def new_data_of_an_activation(scene):
    scene.h.data = torch.zeros(4, 8)


def numpy(scene):
    array = scene.h.detach().numpy()
    array *= 2


def numpy_of_the_batch(scene):
    scene.x.numpy()[0, 0] += 1


def numpy_shuffle(scene):
    np.random.default_rng(3).shuffle(scene.x.numpy())


def dlpack(scene):
    torch.from_dlpack(scene.h.detach()).mul_(2)


def negated(scene):
    scene.h.data.neg_()


def one_entry(scene):
    scene.h.data[2, 3] = torch.nextafter(scene.h.data[2, 3], torch.tensor(9.0))


def untyped_storage(scene):
    scene.h.untyped_storage().fill_(0)


UNCOUNTED = [
    data,
    data_of_a_view,
    view_of_data,
    data_of_a_weight,
    foreach_on_data,
    new_data_of_a_weight,
    new_data_of_an_activation,
    numpy,
    numpy_of_the_batch,
    numpy_shuffle,
    dlpack,
    negated,
    one_entry,
    untyped_storage,
]
REPLACED = [new_data_of_a_weight, new_data_of_an_activation]


def name_of(function):
    return function.__name__


def without_maker(error):
    return re.sub(r", which is output \d+ of \w+,", "", str(error))


@pytest.mark.parametrize("level", ["version", "checksum"])
@pytest.mark.parametrize("write", COUNTED, ids=name_of)
def test_a_counted_write_ends_in_torchs_own_error_word_for_word(write, level):
    plain = Scene()
    write(plain)
    with pytest.raises(RuntimeError) as expected:
        plain.gradients()
    guard = SavedTensorGuard(level=level)
    scene = Scene(guard)
    write(scene)
    with pytest.raises(RuntimeError) as raised:
        scene.gradients()
    assert without_maker(raised.value) == without_maker(expected.value)
    if write not in (counted_copy, foreach):  # a view of the weight, which is gone: nobody knows what made it
        assert str(raised.value) == str(expected.value)
    assert [change.kind for change in guard.findings] == ["version"]
    assert raised.value.change == guard.findings[0]


def test_a_recorded_write_ends_in_torchs_own_error_too():
    def loss(guard):
        torch.manual_seed(0)
        x = torch.randn(3, requires_grad=True)
        with guard:
            y = x.exp()
            total = y.sum()
        y.mul_(2)
        return total + y.sum()

    messages = []
    for guard in (SavedTensorGuard(), torch.enable_grad()):
        with pytest.raises(RuntimeError, match="modified by an inplace operation") as raised:
            loss(guard).backward()
        messages.append(without_maker(raised.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("write", UNCOUNTED, ids=name_of)
def test_an_uncounted_write_is_found_and_the_gradient_is_what_it_would_be_without_the_guard(write):
    clean, plain = Scene().gradients(), Scene()
    write(plain)
    expected = plain.gradients()
    assert not all(map(torch.equal, clean, expected)), "the write corrupts nothing"
    guard = SavedTensorGuard()
    scene = Scene(guard)
    write(scene)
    assert all(map(torch.equal, scene.gradients(), expected))
    kinds = {change.kind for change in guard.verify()}
    assert kinds == {"storage replaced" if write in REPLACED else "values"}


@pytest.mark.parametrize("write", UNCOUNTED, ids=name_of)
def test_without_checksums_only_replaced_memory_is_found(write):
    guard = SavedTensorGuard(level="version")
    scene = Scene(guard)
    write(scene)
    scene.gradients()
    assert bool(guard.findings) == (write in REPLACED)


def test_a_change_says_which_tensor_of_which_operation_was_saved_where():
    guard = SavedTensorGuard()
    scene = Scene(guard)
    scene.h.data.mul_(2)
    scene.loss.backward()
    by_last, by_sigmoid = guard.verify()
    assert (by_last.node, by_last.argument) == ("AddmmBackward0", "mat1")
    assert (by_sigmoid.node, by_sigmoid.argument) == ("SigmoidBackward0", "result")
    assert by_last.storage == by_sigmoid.storage
    assert (by_sigmoid.shape, by_sigmoid.dtype, by_sigmoid.parameter) == ((4, 8), torch.float32, "")
    place = by_sigmoid.saved_at
    assert place.path == __file__
    assert place.name.endswith("forward")
    assert linecache.getline(place.path, place.line).strip() == "self.h = self.first(self.x).sigmoid()"
    assert (
        linecache.getline(__file__, by_last.saved_at.line).strip() == 'self.y = self.model["scale"](self.last(self.h))'
    )


@pytest.mark.parametrize("write", [data_of_a_weight, new_data_of_a_weight], ids=name_of)
def test_a_parameter_is_named(write):
    guard = SavedTensorGuard()
    scene = Scene(guard)
    write(scene)
    scene.loss.backward()
    assert [change.parameter for change in guard.findings] == ["scale.by"]


def test_a_write_that_was_noted_since_is_told_and_an_older_one_is_not():
    log = WriteLog()
    guard = SavedTensorGuard(writes=log)
    x = torch.randn(3, requires_grad=True)
    place = Site("net.py", 7, "f")
    with guard:
        h = x * 2
        log.note(h, "before it was saved", place)
        y = h.exp()
    log.note(torch.zeros(3), "elsewhere", place)
    log.note(y[1:].data, "Tensor.mul_", place)
    y.data.mul_(2)
    log.note(y.data, "Tensor.mul_", place)
    y.sum().backward()
    (change,) = guard.findings
    assert [write.description for write in change.written_by] == ["Tensor.mul_"]
    assert change.written_by[0].place == place


def test_new_data_where_only_a_view_was_saved_changes_no_gradient_and_is_no_finding():
    clean, guard = Scene().gradients(), SavedTensorGuard()
    scene = Scene(guard)
    scene.last.weight.data = torch.zeros(8, 8)
    assert all(map(torch.equal, scene.gradients(), clean))
    assert guard.findings == []


def test_each_change_is_told_as_it_is_found():
    told = []
    guard = SavedTensorGuard(on_change=told.append)
    scene = Scene(guard)
    scene.h.data.mul_(2)
    scene.loss.backward()
    assert told == guard.findings
    assert len(told) == 2


def test_a_batch_in_memory_that_the_loader_fills_again_is_found():
    memory = np.ones((4, 8), dtype=np.float32)
    guard = SavedTensorGuard()
    layer = nn.Linear(8, 1)
    with guard:
        loss = layer(torch.from_numpy(memory)).sum()
    memory[:] = 2
    loss.backward()
    assert [(change.kind, change.argument) for change in guard.findings] == [("values", "mat1")]


@pytest.mark.parametrize(
    "kwargs", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=["fused", "foreach", "loop"]
)
def test_an_optimizer_that_steps_between_two_backward_passes_is_never_silent(kwargs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, **kwargs)
    guard = SavedTensorGuard(dict(model.named_parameters()))
    with guard:
        out = model(torch.randn(3, 4))
        first, second = out.sum(), (out * out).sum()
    first.backward(retain_graph=True)
    optimizer.step()
    try:
        second.backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    assert guard.findings[0].parameter == "2.weight"
    if "fused" not in kwargs:
        assert guard.findings[0].kind == "version"


def test_a_fused_kernel_counts_nothing_or_is_found_as_counted():
    """Torch's fused kernels may write without counting; whichever it is with this version, it must be found."""
    weight = torch.randn(4, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1, fused=True)
    guard = SavedTensorGuard({"weight": weight})
    with guard:
        loss = weight.exp().sum() + (weight * weight).sum()
    loss.backward(retain_graph=True)
    version = weight._version
    optimizer.step()
    is_counted = weight._version != version
    if is_counted:
        with pytest.raises(RuntimeError, match="inplace"):
            loss.backward()
    else:
        loss.backward()
    assert {change.kind for change in guard.findings} == {"version" if is_counted else "values"}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_a_write_to_a_sparse_tensor_is_found(layout):
    matrix = torch.eye(6).to_sparse() if layout == "coo" else torch.eye(6).to_sparse_csr()
    x = torch.randn(6, 3, requires_grad=True)
    for is_written in (False, True):
        guard = SavedTensorGuard()
        with guard:
            loss = (matrix @ x).pow(2).sum()
        if is_written:
            values = matrix._values() if layout == "coo" else matrix.values()
            values.data[0] = 7.0
        loss.backward()
        assert bool(guard.findings) == is_written


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


def test_what_a_custom_function_saves_is_watched():
    x = torch.randn(3, requires_grad=True)
    guard = SavedTensorGuard({"x": x})
    with guard:
        loss = Square.apply(x).sum()
    x.data.add_(1)
    loss.backward()
    (change,) = guard.findings
    assert (change.node, change.parameter, change.kind) == ("SquareBackward", "x", "values")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64, torch.float64], ids=str)
def test_any_dtype_is_watched(dtype):
    x = torch.ones(5, dtype=dtype, requires_grad=True)
    guard = SavedTensorGuard()
    with guard:
        loss = (x * x).sum().abs()
    x.data[1] = 2
    loss.backward()
    assert guard.findings
    assert {change.kind for change in guard.findings} == {"values"}


def test_a_second_backward_pass_looks_again():
    x = torch.randn(3, requires_grad=True)
    guard = SavedTensorGuard()
    with guard:
        loss = x.exp().sum()
    loss.backward(retain_graph=True)
    assert guard.findings == []
    (saved,) = [loss.grad_fn.next_functions[0][0]._saved_result]
    saved.data.mul_(2)
    loss.backward()
    assert len(guard.findings) == 1


def test_looking_at_a_saved_tensor_outside_of_a_backward_pass_is_no_finding():
    x = torch.randn(3, requires_grad=True)
    guard = SavedTensorGuard()
    with guard:
        y = x.exp()
    y.data.mul_(2)
    assert torch.equal(y.grad_fn._saved_result, y)
    assert guard.findings == []


def test_checksums_of_a_device_are_compared_in_verify_alone(monkeypatch):
    """On an accelerator nothing may sync before: here the CPU is taken for one."""
    monkeypatch.setattr("safeloop.autograd.saved._is_at_hand", lambda checksum: False)
    guard = SavedTensorGuard()
    scene = Scene(guard)
    scene.h.data.mul_(2)
    scene.loss.backward()
    assert guard.findings == []
    found = guard.verify()
    assert {change.kind for change in found} == {"values"}
    assert {change.node for change in found} == {"AddmmBackward0", "SigmoidBackward0"}
    assert guard.verify() == found
