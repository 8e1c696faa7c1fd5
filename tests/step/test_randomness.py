"""What the random state of a turn costs: Python's and numpy's are kept where turns draw from them."""

import random

import numpy as np
import pytest
import torch

from safeloop.bundles.random_state import packed_state, unpacked_state
from safeloop.step.randomness import EVERY, FIRST_TURNS, RandomKeeper

DRAWS = {"python": random.random, "numpy": np.random.rand, "torch": lambda: float(torch.rand(1))}


def turns(keeper, number, *, before=(), inside=()):
    states = []
    for _ in range(number):
        for source in before:
            DRAWS[source]()
        states.append(keeper.keep())
        for source in inside:
            DRAWS[source]()
        keeper.ran(states[-1])
    return states


@pytest.mark.parametrize("before", [(), ("python", "numpy", "torch")])
def test_what_the_data_draws_between_turns_is_not_kept(before):
    states = turns(RandomKeeper([]), 2 * EVERY, before=before, inside=("torch",))
    kept = [turn for turn, state in enumerate(states) if state.host is not None]
    assert kept == [*range(FIRST_TURNS), EVERY]


@pytest.mark.parametrize("source", ["python", "numpy"])
def test_what_turns_draw_is_kept_once_it_was_seen(source):
    keeper = RandomKeeper([])
    turns(keeper, FIRST_TURNS + 5)
    late = turns(keeper, EVERY, inside=(source,))
    seen = EVERY - FIRST_TURNS - 5  # the next turn at which somebody looks
    assert all(state.host is None for state in late[:seen])
    assert all(state.host is not None for state in late[seen:])


@pytest.mark.parametrize("source", ["python", "numpy", "torch"])
def test_a_kept_state_gives_the_same_numbers_again(source):
    draw = DRAWS[source]
    state = RandomKeeper([]).keep()
    first = [draw() for _ in range(3)]
    state.restore()
    assert [draw() for _ in range(3)] == first


def test_a_bundle_without_the_state_of_python_and_numpy_reads_back_without_it():
    keeper = RandomKeeper([])
    state = turns(keeper, FIRST_TURNS + 1)[-1]
    tensors: dict[str, torch.Tensor] = {}
    packed = packed_state(state, tensors)
    assert set(tensors) == {"random/cpu"}
    assert unpacked_state(packed, tensors).host is None
