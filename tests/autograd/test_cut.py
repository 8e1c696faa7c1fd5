from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from safeloop.autograd.cut import Descent, OutOfOrder, reaching, shared_cut


def scalar(tensor):
    return tensor.square().mean()


def two_heads(trunk, x, num_heads=2):
    z = trunk(x)
    return z, [scalar(nn.Linear(z.shape[-1], 2)(z)) for _ in range(num_heads)]


def naive_masks(terms):
    """The oracle: one plain walk for each term, sets only."""
    masks = {}
    for k, term in enumerate(terms):
        seen, waiting = set(), [term.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen or node.name().endswith("AccumulateGrad"):
                continue
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
        for node in seen:
            masks[node] = masks.get(node, 0) | 1 << k
    return masks


def naive_crossings(terms):
    """The oracle: every way from a node of one term alone into a node of several."""
    masks = naive_masks(terms)
    return {
        (consumer, position, (node, output), masks[consumer].bit_length() - 1)
        for consumer, mask in masks.items()
        if mask.bit_count() == 1
        for position, (node, output) in enumerate(consumer.next_functions)
        if node in masks and masks[node].bit_count() > 1
    }


def test_the_cut_is_the_output_of_the_trunk():
    z, terms = two_heads(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), torch.randn(5, 3), num_heads=3)
    cut = shared_cut(terms)
    assert cut.edges == ((z.grad_fn, z.output_nr),)
    assert sorted(tap.term for tap in cut.taps) == [0, 1, 2]
    assert cut.roots == ()
    for tap in cut.taps:
        assert tap.consumer.next_functions[tap.position] == tap.edge


def test_the_trunk_is_never_walked():
    def visited(depth):
        _, terms = two_heads(nn.Sequential(*[nn.Tanh() for _ in range(depth)]), torch.ones(2, 3, requires_grad=True))
        return shared_cut(terms).num_visited

    assert visited(2) == visited(5_000)


@pytest.mark.parametrize("terms", [0, 1, 2])
def test_terms_that_share_nothing_have_no_cut(terms):
    assert not shared_cut([scalar(nn.Linear(2, 2)(torch.ones(1, 2))) for _ in range(terms)]).edges


def test_a_leaf_is_no_cut():
    layer = nn.Linear(2, 2)
    assert not shared_cut([scalar(layer(torch.ones(1, 2))), scalar(layer(torch.zeros(1, 2)))]).edges
    assert not shared_cut([layer.weight.square().sum(), layer.weight.sum()]).edges


def test_a_leaf_that_is_a_term_and_a_constant_are_passed_over():
    leaf = torch.ones((), requires_grad=True)
    z, terms = two_heads(nn.Linear(2, 2), torch.ones(1, 2))
    cut = shared_cut([leaf, terms[0], torch.ones(()), terms[1]])
    assert cut.edges == ((z.grad_fn, 0),)
    assert {tap.term for tap in cut.taps} == {1, 3}


def test_a_term_made_from_another_meets_it_at_its_root():
    first = scalar(nn.Linear(2, 2)(torch.ones(1, 2)))
    second = first.sqrt()
    cut = shared_cut([first, second])
    assert cut.roots == (((first.grad_fn, 0), 0),)
    assert [(tap.edge, tap.term) for tap in cut.taps] == [((first.grad_fn, 0), 1)]


def test_the_same_term_twice_meets_itself():
    term = scalar(nn.Linear(2, 2)(torch.ones(1, 2)))
    assert shared_cut([term, term]).roots == (((term.grad_fn, 0), 0), ((term.grad_fn, 0), 1))


def test_a_weight_cast_by_autocast_is_no_more_a_cut_than_the_weight():
    layer = nn.Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        terms = [layer(torch.ones(1, 4)).float().sum(), layer(torch.zeros(1, 4)).float().square().sum()]
        trunk = layer(torch.ones(1, 4))
        with_trunk = [scalar(layer(trunk).float()), trunk.float().sum()]
    assert reaching(terms)
    assert not shared_cut(terms).edges
    assert shared_cut(with_trunk).edges == ((trunk.grad_fn, 0),)


def test_features_taken_at_several_depths_are_all_in_the_cut():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    shallow = first(torch.ones(1, 2))
    deep = second(shallow)
    terms = [scalar(deep), scalar(deep * 2), scalar(shallow), scalar(deep @ shallow.T)]
    at_deep, at_shallow = (deep.grad_fn, 0), (shallow.grad_fn, 0)
    assert {(tap.term, tap.edge) for tap in shared_cut(terms).taps} == {
        (0, at_deep),
        (1, at_deep),
        (2, at_shallow),
        (3, at_deep),
        (3, at_shallow),
    }


def read_again_after_a_write():
    """A view whose node is newer than the node that reads it."""
    base = nn.Linear(3, 3)(torch.ones(2, 3)) * 1
    view = base[0]
    base.mul_(2)
    return base, [scalar(view * 3), scalar(base.sin()), scalar(view.exp())]


def made_in_a_thread():
    """A trunk that is newer, by its numbers, than its heads."""
    x = torch.ones(2, 3, requires_grad=True)
    for _ in range(100):
        trunk = x.tanh()
    terms = []

    def heads():
        terms.extend([scalar(trunk.sin()), scalar(trunk.cos())])

    thread = threading.Thread(target=heads)
    thread.start()
    thread.join()
    return trunk, terms


@pytest.mark.parametrize("make", [read_again_after_a_write, made_in_a_thread])
def test_where_numbers_do_not_say_the_order_the_whole_graph_is_walked(make):
    _, terms = make()
    with pytest.raises(OutOfOrder):
        descent = Descent(terms)
        while descent:
            descent.pop()
    assert set(shared_cut(terms).taps) == naive_crossings(terms)


def test_a_full_walk_finds_every_node_and_its_terms():
    _, terms = two_heads(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), torch.randn(5, 3), num_heads=4)
    assert reaching(terms) == naive_masks(terms)


def test_what_a_descent_pops_is_what_a_plain_walk_finds_children_after_parents():
    _, terms = two_heads(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(5, 3), num_heads=3)
    descent, popped = Descent(terms), {}
    while descent:
        node, mask = descent.pop()
        assert not any(following in popped for following, _ in node.next_functions)
        popped[node] = mask
    assert popped == naive_masks(terms)
    assert descent.num_single == 0
    assert descent.waiting() == []


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_any_graph_is_cut_where_plain_walks_say(draw_graph, data):
    terms = draw_graph(data)().terms
    masks, cut = naive_masks(terms), shared_cut(terms)
    if cut.below:
        assert {node for node in cut.below if masks[node].bit_count() < 2} == set()
    assert set(cut.taps) == naive_crossings(terms)
    roots = {((term.grad_fn, term.output_nr), k) for k, term in enumerate(terms) if masks[term.grad_fn].bit_count() > 1}
    assert set(cut.roots) == roots
