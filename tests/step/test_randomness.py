"""The random state of a turn: of each generator it is kept where turns draw from it."""

import random

import numpy as np
import pytest
import torch

from safeloop.bundles.random_state import packed_state, unpacked_state
from safeloop.seeds import rng_state
from safeloop.step.randomness import EVERY, EVERY_OF_HOST, FIRST_TURNS, NOTHING_KEPT, RandomKeeper

DRAWS = {"python": random.random, "numpy": np.random.rand, "torch": lambda: float(torch.rand(1))}


def turns(keeper, number, *, start=0, before=(), inside=()):
    states = []
    for step in range(start, start + number):
        for source in before:
            DRAWS[source]()
        states.append(keeper.keep(step))
        for source in inside:
            DRAWS[source]()
        keeper.ran(states[-1])
    return states


@pytest.mark.parametrize("before", [(), ("python", "numpy", "torch")])
def test_what_the_data_draws_between_turns_is_not_kept(before):
    states = turns(RandomKeeper([]), EVERY_OF_HOST + EVERY, before=before)
    of_host = [turn for turn, state in enumerate(states) if state.host is not None]
    of_torch = [turn for turn, state in enumerate(states) if state.cpu is not None]
    assert of_host == [*range(FIRST_TURNS), EVERY_OF_HOST]
    assert of_torch == [*range(FIRST_TURNS), *range(2 * EVERY, EVERY_OF_HOST + EVERY, EVERY)]
    assert states[FIRST_TURNS] is NOTHING_KEPT


@pytest.mark.parametrize(("source", "every"), [("python", EVERY_OF_HOST), ("numpy", EVERY_OF_HOST), ("torch", EVERY)])
def test_what_turns_draw_is_kept_once_it_was_seen(source, every):
    keeper = RandomKeeper([])
    turns(keeper, FIRST_TURNS + 5)
    assert keeper.is_idle
    late = turns(keeper, every, start=FIRST_TURNS + 5, inside=(source,))
    assert not keeper.is_idle
    kept = [(state.cpu if source == "torch" else state.host) is not None for state in late]
    seen = -(FIRST_TURNS + 5) % every  # the next turn at which somebody looks
    assert kept == [False] * seen + [True] * (every - seen)


@pytest.mark.parametrize("source", DRAWS)
def test_a_state_covers_what_was_drawn_from_what_it_keeps(source):
    def drawn(state):
        before = rng_state()
        DRAWS[source]()
        return state.covers(before, rng_state())

    full = RandomKeeper([]).keep(0)
    assert drawn(full)
    assert not drawn(NOTHING_KEPT)
    assert drawn(full._replace(host=None)) == (source == "torch")
    assert drawn(full._replace(cpu=None)) == (source != "torch")
    before = rng_state()
    assert NOTHING_KEPT.covers(before, before)


@pytest.mark.parametrize("source", ["python", "numpy", "torch"])
def test_a_kept_state_gives_the_same_numbers_again(source):
    draw = DRAWS[source]
    state = RandomKeeper([]).keep(0)
    first = [draw() for _ in range(3)]
    state.restore()
    assert [draw() for _ in range(3)] == first


def test_a_bundle_without_a_state_reads_back_without_it():
    keeper = RandomKeeper([])
    state = turns(keeper, FIRST_TURNS + 1)[-1]
    tensors: dict[str, torch.Tensor] = {}
    packed = packed_state(state, tensors)
    assert tensors == {}
    assert unpacked_state(packed, tensors) == NOTHING_KEPT
