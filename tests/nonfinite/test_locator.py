"""The locator by itself: around any forward and backward, and leaving no trace."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from safeloop.nonfinite import Locator


def attention_with_a_mask(model, x):
    scores = (model(x) @ model(x).T).masked_fill(torch.ones(6, 6).triu(1) > 0, float("-inf"))
    return (scores.softmax(-1) @ x).square().mean()


def mask_added_from_outside(model, x):
    return F.log_softmax(model(x) + torch.tensor([0.0, float("-inf"), 0.0, 0.0]), 1)[:, 0].mean()


def smallest_so_far(model, x):
    best = torch.full((4,), float("inf"))
    for row in model(x):
        best = torch.minimum(best, row)
    return best.sum()


def infinity_as_padding(model, x):
    padded = F.pad(model(x), (0, 2), value=float("-inf"))
    return padded.amax(1).mean()


def guarded_root(model, x):
    y = model(x).square().sum(1) * torch.tensor([0.0, 1, 1, 1, 0, 1])
    safe = torch.where(y > 0, y, 1.0)
    return torch.where(y > 0, safe.sqrt(), 0.0).mean()


def missing_values_masked(model, x):
    targets = x.clone()
    targets[0] = float("nan")
    return (model(x) - targets.nan_to_num()).square().mean()


def logsumexp_over_nothing(model, x):
    empty = torch.logsumexp(torch.full((6, 2), float("-inf")), 1)
    return torch.logaddexp(model(x)[:, 0], empty).mean()


def norm_of_zero(model, x):
    return (model(x) * 0).norm(dim=1).mean() + model(x).mean()


def deviation_of_a_constant(model, x):
    return (model(x)[:, :1].expand(-1, 3)).std(1).mean()


def distance_to_itself(model, x):
    return torch.cdist(model(x), model(x)).mean()


def uninitialised_memory(model, x):
    out = torch.empty(6, 4)
    out.copy_(model(x))
    return out.mean()


HEALTHY = [
    attention_with_a_mask,
    mask_added_from_outside,
    smallest_so_far,
    infinity_as_padding,
    guarded_root,
    missing_values_masked,
    logsumexp_over_nothing,
    norm_of_zero,
    deviation_of_a_constant,
    distance_to_itself,
    uninitialised_memory,
]


def model_and_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.ReLU(), nn.Linear(8, 4))
    return model, torch.randn(6, 4)


@pytest.mark.parametrize("loss", HEALTHY, ids=lambda loss: loss.__name__)
def test_infinities_that_are_meant_are_no_cause(loss):
    model, x = model_and_batch()
    with Locator(model, batch={"batch": x}) as locator:
        value = loss(model, x)
        gradients = torch.autograd.grad(value, list(model.parameters()))
        assert locator.cause([value]) is None
        assert locator.cause(gradients) is None


@pytest.mark.parametrize("loss", HEALTHY, ids=lambda loss: loss.__name__)
def test_values_gradients_and_random_state_have_the_same_bits(loss):
    def run(locator):
        model, x = model_and_batch()
        with locator(model):
            value = loss(model, x)
            value.backward()
        return [value.detach(), torch.get_rng_state(), *(p.grad for p in model.parameters())]

    class Nothing:
        def __init__(self, model): ...
        def __enter__(self): ...
        def __exit__(self, *args): ...

    for ours, plain in zip(run(Locator), run(Nothing), strict=True):
        assert torch.equal(ours, plain)


def test_hooks_and_modes_are_gone_after_an_exception():
    model, x = model_and_batch()
    with pytest.raises(ValueError, match="own"), Locator(model):
        model(x)
        raise ValueError("the user's own")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert _get_current_dispatch_mode_stack() == []
    assert torch.overrides._get_current_function_mode() is None


def test_a_module_that_raises_leaves_the_stack_of_modules_right():
    class Raises(nn.Module):
        def forward(self, x):
            raise ValueError("own")

    model = nn.ModuleDict({"bad": Raises(), "good": nn.Linear(4, 4)})
    with Locator(model) as locator:
        with pytest.raises(ValueError, match="own"):
            model["bad"](torch.ones(1))
        value = model["good"](torch.full((1, 4), 3e38)).sum() + torch.log(torch.zeros(1)).sum()
    assert locator.cause([value]).module in ("good", "")
    assert locator.births[-1].module == ""


def test_only_the_birth_that_reaches_the_tensor_is_named():
    w = torch.ones(3, requires_grad=True)
    with Locator() as locator:
        torch.log(w * 0)  # reaches nothing
        bad = (w - 5).sqrt()
    assert len(locator.births) == 2
    assert locator.cause([bad.sum()]) is None, "made outside: nothing is known"
    assert locator.cause([bad]).op == "sqrt"


def test_a_view_and_an_in_place_write_carry_the_birth():
    w = torch.ones(4, requires_grad=True)
    with Locator() as locator:
        buffer = torch.zeros(2, 4)
        buffer[1] = (w * 0).log()
        reached = buffer.view(8)[4:].mean()
    birth = locator.cause([reached])
    assert (birth.phase, birth.op, birth.kind) == ("forward", "log", "inf")


def test_a_write_that_makes_all_finite_forgets_the_birth():
    w = torch.zeros(4, requires_grad=True)
    with Locator() as locator:
        first = w.log()
        with torch.no_grad():
            first.zero_()
        second = torch.sqrt(first - 1)
    assert locator.cause([second]).op == "sqrt"


def test_a_node_inside_a_composite_function_is_mapped_to_the_users_line():
    w = torch.zeros(3, 4, requires_grad=True)
    with Locator() as locator:
        value = F.layer_norm(w, (4,), eps=0.0).sum()  # the line
    assert locator.cause([value]).place.text.endswith("# the line")


def test_a_birth_in_the_backward_names_the_forward_line():
    w = torch.zeros(4, requires_grad=True)
    with Locator() as locator:
        root = w.sqrt()  # the line
        (gradient,) = torch.autograd.grad(root.sum(), w)
    birth = locator.cause([gradient], ("loss",))
    assert (birth.phase, birth.node, birth.terms) == ("backward", "SqrtBackward0", ("loss",))
    assert birth.place.text.endswith("# the line")
    assert birth.inputs[1].num_zeros == 4


def test_a_plain_backward_names_the_forward_line_too():
    w = torch.zeros(4, requires_grad=True)
    with Locator() as locator:
        root = w.sqrt()  # the line
        root.sum().backward()
    assert locator.cause([w.grad]).place.text.endswith("# the line")


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_inside_a_checkpoint_too(use_reentrant):
    from torch.utils.checkpoint import checkpoint

    def inner(v):
        return (v * 0).sqrt().sum()  # the line

    w = torch.ones(4, requires_grad=True)
    with Locator() as locator:
        checkpoint(inner, w, use_reentrant=use_reentrant).backward()
    assert locator.cause([w.grad]).place.text.endswith("# the line")


def test_a_sparse_gradient_is_followed():
    table = nn.Embedding(5, 3, sparse=True)
    with Locator(table) as locator:
        loss = (table(torch.tensor([1, 2])) * 0).sqrt().sum()
        loss.backward()
    assert locator.cause([table.weight.grad]).node == "SqrtBackward0"


def test_a_parameter_that_is_bad_already_is_named():
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.bias[0] = float("inf")
    with Locator(model) as locator:
        value = model(torch.ones(2, 3)).sum()
    birth = locator.cause([value])
    assert (birth.phase, birth.op, birth.num_bad) == ("given", "parameter `bias`", 1)


def test_per_sample_gradients_are_followed():
    w, x = torch.randn(2, 3), torch.randn(4, 3)

    def loss(w, row):
        return ((row @ w.T) * 0).square().sum().sqrt()  # the line

    with Locator() as locator:
        gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(w, x)
        bad = gradients.sum()
    birth = locator.cause([bad])
    assert birth.node == "SqrtBackward0"
    assert birth.place.text.endswith("# the line")
