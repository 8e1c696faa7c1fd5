from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from safeloop.autograd.retain import retain_flags


def passes(terms, order, flags, seeds=None):
    """Run the passes one by one; False where torch says that something was freed too early."""
    for k, flag in zip(order, flags, strict=True):
        try:
            seed = torch.ones_like(terms[k]) if seeds is None else seeds[k]
            torch.autograd.backward([terms[k]], [seed], retain_graph=flag)
        except RuntimeError as error:
            assert "second time" in str(error)
            return False
    return True


def is_exact(make, order):
    """The oracle is torch: these flags run, and taking any one away does not."""
    flags = retain_flags(make(), order)
    assert passes(make(), order, flags), f"missing: {flags}"
    for p, flag in enumerate(flags):
        if flag:
            assert not passes(make(), order, [*flags[:p], False, *flags[p + 1 :]]), f"unneeded: {flags}, {p}"
    return flags


def heads(trunk, x, num_heads=3):
    z = trunk(x)
    return [nn.Linear(z.shape[-1], 1)(z).square().mean() for _ in range(num_heads)]


def test_terms_on_one_trunk_retain_all_but_the_last_in_every_order():
    for order in itertools.permutations(range(3)):
        assert is_exact(lambda: heads(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), torch.ones(1, 2)), order) == [
            True,
            True,
            False,
        ]


def test_terms_that_share_only_leaves_retain_nothing():
    layer = nn.Linear(4, 4)

    def make():
        return [layer(torch.ones(2, 4)).sum(), layer(torch.zeros(2, 4)).square().sum(), (layer.weight * 2).sum()]

    assert is_exact(make, [0, 1, 2]) == [False, False, False]


def test_only_the_terms_that_a_later_one_meets_are_retained():
    def make():
        left, right = (nn.Linear(2, 2)(torch.ones(1, 2)).tanh() for _ in range(2))
        return [left.sin().sum(), right.sin().sum(), left.cos().sum(), right.cos().sum(), nn.Linear(1, 1).weight.exp()]

    assert is_exact(make, [0, 1, 2, 3, 4]) == [True, True, False, False, False]
    assert is_exact(make, [0, 2, 1, 4, 3]) == [True, False, True, False, False]
    assert is_exact(make, [4, 3, 2]) == [False, False, False]


def test_shared_nodes_that_save_nothing_need_nothing():
    x = torch.ones(3, requires_grad=True)

    def make():
        z = x + 1
        return [z.sum(), z.sum() + 2]

    assert is_exact(make, [0, 1]) == [False, False]


def only_the_bias_is_trained():
    layer = nn.Linear(2, 2)
    layer.weight.requires_grad_(False)
    return layer(torch.ones(1, 2))


def written_in_place():
    base = torch.ones(4, requires_grad=True) + 1
    base[:2].mul_(2)
    return base


class SavesNothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


class SavesTheInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2 * ctx.saved_tensors[0]


@pytest.mark.parametrize(
    ("shared", "is_needed"),
    [
        (only_the_bias_is_trained, False),
        (written_in_place, True),
        (lambda: torch.cat([torch.ones(2, requires_grad=True)] * 2), False),
        (lambda: torch.ones(2, requires_grad=True)[[0, 1]], True),
        (lambda: torch.ones(2, requires_grad=True) * 2.0, True),
        (lambda: torch.ones(2, requires_grad=True).exp(), True),
        (lambda: torch.ones(2, 2, requires_grad=True).view(4), False),
        (lambda: SavesNothing.apply(torch.ones(2, requires_grad=True)), False),
        (lambda: SavesTheInput.apply(torch.ones(2, requires_grad=True)), True),
        (lambda: nn.LSTM(2, 2)(torch.ones(3, 1, 2))[0], True),
        (lambda: nn.Embedding(3, 2)(torch.tensor([1, 2])), True),
        (lambda: nn.BatchNorm1d(2)(torch.ones(3, 2)), True),
        (lambda: torch.ones(2, requires_grad=True).double(), False),
    ],
)
def test_a_shared_node_counts_if_it_holds_something(shared, is_needed):
    def make():
        z = shared()
        return [z.sum(), (z + 1).sum()]

    assert is_exact(make, [0, 1]) == [is_needed, False]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_is_looked_at_and_never_run(use_reentrant):
    runs = []

    def make():
        x = torch.ones(2, 2, requires_grad=True)

        def block(t):
            runs.append(1)
            return t.tanh()

        z = checkpoint(block, x, use_reentrant=use_reentrant)
        return [z.sum(), (z + 1).sum()]

    terms = make()
    before = len(runs)
    assert retain_flags(terms, [0, 1]) == [True, False]
    assert len(runs) == before
    assert is_exact(make, [0, 1]) == [True, False]


def test_nothing_behind_saved_tensor_hooks_is_unpacked():
    unpacked = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), lambda t: (unpacked.append(t), t)[1]):
        terms = heads(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), torch.ones(1, 2))
    assert retain_flags(terms, [2, 1, 0]) == [True, True, False]
    assert unpacked == []


def test_a_term_run_twice_is_retained_between():
    assert is_exact(lambda: heads(nn.Linear(2, 2), torch.ones(1, 2)), [0, 0, 1]) == [True, True, False]


def test_leaves_constants_and_no_terms_need_nothing():
    assert retain_flags([], []) == []
    terms = [torch.ones((), requires_grad=True), torch.ones(())]
    assert retain_flags(terms, [1, 0]) == [False, False]


def test_where_numbers_do_not_say_the_order_the_flags_are_exact_too():
    def make():
        base = torch.ones(2, 3, requires_grad=True) * 1
        view = base[:]
        base.mul_(2)
        return [(view * 3).sum(), base.sin().sum(), (view + 1).sum()]

    for order in itertools.permutations(range(3)):
        is_exact(make, order)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_graph_has_no_flag_missing_and_none_unneeded(draw_graph, data):
    make = draw_graph(data)
    seeds = make().seeds
    order = data.draw(st.permutations(range(len(seeds))))
    flags = retain_flags(make().terms, order)
    assert passes(make().terms, order, flags, seeds), f"missing: {flags}"
    for p, flag in enumerate(flags):
        if flag:
            without = [*flags[:p], False, *flags[p + 1 :]]
            assert not passes(make().terms, order, without, seeds), f"unneeded: {flags}, {p}"


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_separate_passes_give_the_gradients_of_the_fused_one(draw_graph, data):
    make = draw_graph(data)
    fused, apart = make(), make()
    torch.autograd.backward(fused.terms, fused.seeds)
    order = list(range(len(apart.terms)))
    assert passes(apart.terms, order, retain_flags(apart.terms, order), apart.seeds)
    for left, right in zip(apart.grads(), fused.grads(), strict=True):
        assert (left is None) == (right is None)
        if left is not None:
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9 * (1 + float(right.abs().max())))
