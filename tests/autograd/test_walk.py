from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from safeloop.autograd.walk import reach, reached_leaves


def with_gradient(tensors, loss):
    """The oracle: the leaves whose `.grad` a real backward fills."""
    loss.backward()
    return {tensor for tensor in tensors if tensor.grad is not None}


def test_the_leaves_of_a_loss_are_those_that_backward_fills():
    torch.manual_seed(0)
    used, unused = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), nn.Linear(3, 1)
    used[0].bias.requires_grad_(False)
    everything = [*used.parameters(), *unused.parameters()]
    loss = used(torch.randn(5, 3)).square().mean()
    assert reached_leaves(loss) == with_gradient(everything, loss)


def test_a_detached_branch_is_not_reached():
    first, second = nn.Linear(2, 2), nn.Linear(2, 1)
    loss = second(first(torch.ones(1, 2)).detach()).sum()
    assert reached_leaves(loss) == set(second.parameters())


def test_an_input_that_requires_grad_is_a_leaf_too():
    x, layer = torch.ones(1, 2, requires_grad=True), nn.Linear(2, 1)
    assert reached_leaves(layer(x).sum()) == {x, *layer.parameters()}


def test_a_second_derivative_reaches_the_weights_that_made_the_first():
    x, layer = (
        torch.ones(1, 2, requires_grad=True),
        nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1, bias=False)),
    )
    (slope,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    assert {layer[0].weight, layer[2].weight} <= reached_leaves(slope.square().sum())


def test_a_leaf_reaches_itself_and_a_constant_reaches_nothing():
    leaf = torch.zeros((), requires_grad=True)
    assert reached_leaves(leaf) == {leaf}
    assert reached_leaves(torch.zeros(())) == set()


def test_a_graph_deeper_than_the_stack_is_walked():
    leaf = torch.ones((), requires_grad=True)
    value = leaf
    for _ in range(20_000):
        value = value + 1
    assert reached_leaves(value) == {leaf}


def test_a_reentrant_checkpoint_makes_the_walk_incomplete_and_nothing_else_does():
    block, x = nn.Linear(2, 2), torch.ones(1, 2, requires_grad=True)
    hidden = reach(checkpoint(block, x, use_reentrant=True).sum())
    assert not hidden.is_complete
    assert block.weight not in hidden.leaves
    seen = reach(checkpoint(block, x, use_reentrant=False).sum())
    assert seen.is_complete
    assert block.weight in seen.leaves


def test_a_node_with_many_paths_is_visited_once():
    leaf = torch.ones((), requires_grad=True)
    value = leaf
    for _ in range(100):
        value = value + value
    assert reached_leaves(value) == {leaf}
