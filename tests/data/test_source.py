from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from safeloop.data.source import open_source
from safeloop.faults import FaultError
from safeloop.seeds import rng_state, seed_everything

OURS = {"batch_size": 4, "seed": 0, "shuffle": True}


class Augmented(Dataset):
    """Samples that draw from every generator."""

    def __init__(self, length=11):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        draws = torch.tensor([torch.randn(()).item(), np.random.randn(), random.random()], dtype=torch.float64)
        return {"index": index, "draws": draws, "noise": torch.rand(2)}


class Stream(IterableDataset):
    def __iter__(self):
        yield from torch.arange(10)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return type(a) is type(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))


def state_bytes():
    state = rng_state()
    return state.torch.numpy().tobytes(), state.numpy[1].tobytes(), state.numpy[2:], state.python


def code(call):
    with pytest.raises(FaultError) as caught:
        call()
    return caught.value.fault.code


sizes = st.integers(1, 40)


@settings(deadline=None)
@given(num=sizes, batch_size=sizes, seed=st.integers(0, 2**40), epoch=st.integers(0, 5), shuffle=st.booleans())
def test_every_sample_comes_once_per_epoch_in_an_order_of_seed_and_epoch_alone(num, batch_size, seed, epoch, shuffle):
    data = TensorDataset(torch.arange(num))
    options = {"batch_size": batch_size, "seed": seed, "shuffle": shuffle}
    first = open_source(data, **options)
    list(first.epoch(epoch + 1))
    torch.rand(1)
    orders = [
        torch.cat([batch[0] for batch in source.epoch(epoch)]) for source in (first, open_source(data, **options))
    ]
    assert torch.equal(*orders)
    assert orders[0].sort().values.tolist() == list(range(num))
    assert first.num_batches == len(list(first.epoch(epoch)))
    assert first.num_samples == num
    if not shuffle:
        assert orders[0].tolist() == list(range(num))


def test_epochs_and_seeds_have_different_orders():
    data = TensorDataset(torch.arange(100))
    orders = {
        tuple(torch.cat([b[0] for b in open_source(data, batch_size=7, seed=seed, shuffle=True).epoch(epoch)]).tolist())
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(orders) == 16


@settings(deadline=None)
@given(num=st.integers(1, 20), batch_size=st.integers(1, 8), drop_last=st.booleans(), shuffle=st.booleans())
def test_the_in_memory_path_gives_the_batches_of_a_loader_in_the_same_order(num, batch_size, drop_last, shuffle):
    if drop_last and num < batch_size:
        return
    tensors = (torch.randn(num, 3, 2).transpose(1, 2), torch.randint(9, (num,)), torch.rand(num) > 0.5)
    dataset = TensorDataset(*tensors)
    source = open_source(dataset, batch_size=batch_size, seed=2, shuffle=shuffle, drop_last=drop_last)
    plain = open_source(Wrapped(dataset), batch_size=batch_size, seed=2, shuffle=shuffle, drop_last=drop_last)
    assert "in memory" in source.description
    assert "in memory" not in plain.description
    assert same(list(source.epoch(1)), list(plain.epoch(1)))
    assert source.num_batches == plain.num_batches == len(list(plain.epoch(1)))
    assert source.num_samples == plain.num_samples == sum(len(batch[0]) for batch in plain.epoch(1))


class Wrapped(Dataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index]


def test_a_subset_of_tensors_is_indexed_in_memory():
    dataset = TensorDataset(torch.arange(20) * 10)
    nested = Subset(Subset(dataset, [3, 4, -1, 7, 9, 11]), [0, 2, 3, 5])
    source = open_source(nested, batch_size=3, seed=0, shuffle=False)
    assert "in memory" in source.description
    assert torch.cat([b[0] for b in source.epoch(0)]).tolist() == [30, 190, 70, 110]
    assert same(list(source.epoch(0)), list(open_source(Wrapped(nested), batch_size=3, seed=0, shuffle=False).epoch(0)))


def test_a_tensor_data_set_that_reads_in_its_own_way_is_read_in_that_way():
    class Doubled(TensorDataset):
        def __getitem__(self, index):
            return super().__getitem__(index)[0] * 2

    source = open_source(Doubled(torch.arange(4)), batch_size=4, seed=0, shuffle=False)
    assert next(source.epoch(0)).tolist() == [0, 2, 4, 6]


def test_a_batch_shares_no_memory_with_the_data_set():
    values = torch.zeros(8)
    for batch in open_source(TensorDataset(values), batch_size=8, seed=0, shuffle=False).epoch(0):
        batch[0].add_(1)
    assert values.sum() == 0


def test_batches_are_identical_for_any_number_of_workers():
    by_workers = [
        [list(open_source(Augmented(), num_workers=workers, **OURS).epoch(epoch)) for epoch in (0, 1)]
        for workers in (0, 1, 2)
    ]
    assert same(by_workers[0], by_workers[1])
    assert same(by_workers[0], by_workers[2])
    assert not same(by_workers[0][0], by_workers[0][1])


def test_a_samples_random_numbers_depend_on_seed_epoch_and_index_alone():
    def by_index(batch_size, shuffle, seed=0, epoch=0):
        source = open_source(Augmented(), batch_size=batch_size, seed=seed, shuffle=shuffle)
        batches = list(source.epoch(epoch))
        return {int(i): tuple(d.tolist()) for b in batches for i, d in zip(b["index"], b["draws"], strict=True)}

    reference = by_index(4, True)
    seed_everything(99)
    assert by_index(3, False) == reference
    assert len(set(reference.values())) == 11
    assert all(by_index(4, True, seed=1)[i] != draws for i, draws in reference.items())
    assert all(by_index(4, True, epoch=1)[i] != draws for i, draws in reference.items())


class Noisy:
    """Iterates over a shuffled loader, as people wrap them."""

    def __iter__(self):
        yield from DataLoader(range(9), batch_size=3, shuffle=True)


numbers = TensorDataset(torch.arange(9))


@pytest.mark.parametrize(
    "make",
    [
        lambda: numbers,
        Augmented,
        Stream,
        Noisy,
        lambda: DataLoader(numbers),
        lambda: DataLoader(numbers, shuffle=True),
        lambda: DataLoader(numbers, batch_size=2, shuffle=True, num_workers=1),
        lambda: DataLoader(numbers, sampler=WeightedRandomSampler([1.0] * 9, 9)),
        lambda: DataLoader(numbers, sampler=RandomSampler(numbers, replacement=True)),
        lambda: [torch.zeros(2)],
    ],
)
def test_an_epoch_leaves_the_global_random_state_bitwise_untouched_and_is_repeatable(make):
    seed_everything(4)
    np.random.randn()
    before = state_bytes()
    source = open_source(make(), **OURS)
    first = [list(source.epoch(epoch)) for epoch in (0, 1)]
    assert state_bytes() == before
    seed_everything(5)
    again = open_source(make(), **OURS)
    assert same([list(again.epoch(epoch)) for epoch in (0, 1)], first)


def test_an_iterator_that_is_left_half_way_leaves_the_random_state_untouched():
    before = state_bytes()
    batches = open_source(Augmented(), **OURS).epoch(0)
    next(batches)
    batches.close()
    assert state_bytes() == before


def test_torch_draws_from_the_global_state_when_an_iterator_of_a_loader_is_made():
    """The trap that the private random numbers are for."""
    before = state_bytes()
    iter(DataLoader(numbers))
    assert state_bytes() != before


def test_a_loader_is_not_edited_and_its_order_is_its_own():
    sampler = SequentialSampler(numbers)
    loader = DataLoader(numbers, batch_size=2, sampler=sampler)
    attributes = dict(vars(loader))
    source = open_source(loader, batch_size=100, seed=0, shuffle=True, drop_last=True)
    batches = list(source.epoch(0))
    assert torch.cat([b[0] for b in batches]).tolist() == list(range(9))
    assert vars(loader) == attributes
    assert (source.num_batches, source.num_samples, source.is_one_shot) == (5, 9, False)


def test_a_shuffling_loader_changes_its_order_with_the_epoch_and_the_seed():
    loader = DataLoader(torch.arange(50), batch_size=50, shuffle=True)
    orders = {
        tuple(next(open_source(loader, batch_size=1, seed=seed, shuffle=False).epoch(epoch)).tolist())
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_samples_of_a_loader_that_drops_its_last_batch_are_counted_without_it():
    source = open_source(DataLoader(numbers, batch_size=4, drop_last=True), **OURS)
    assert (source.num_batches, source.num_samples) == (2, 8)
    source = open_source(DataLoader(numbers, batch_sampler=[[0, 1], [2]]), **OURS)
    assert (source.num_batches, source.num_samples) == (2, None)


def test_a_list_is_ready_micro_batches_and_comes_as_it_is():
    batches = [torch.zeros(2), {"x": torch.ones(1)}]
    source = open_source(batches, **OURS)
    for epoch in range(2):
        assert all(given is got for given, got in zip(batches, source.epoch(epoch), strict=True))
    assert (source.num_batches, source.num_samples, source.is_one_shot) == (2, None, False)


def test_a_generator_is_read_once():
    source = open_source((torch.zeros(1) for _ in range(3)), **OURS)
    assert source.is_one_shot
    assert source.num_batches is None
    assert len(list(source.epoch(0))) == 3
    assert list(source.epoch(1)) == []


def test_an_iterable_data_set_is_batched_in_its_own_order():
    source = open_source(Stream(), **OURS)
    assert [batch.tolist() for batch in source.epoch(0)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert source.num_batches is None


def test_an_iterable_data_set_is_refused_with_workers_that_would_each_read_all_of_it():
    assert code(lambda: open_source(Stream(), num_workers=2, **OURS)) == "SL855"
    doubled = Counter(int(i) for batch in DataLoader(Stream(), num_workers=2) for i in batch)
    assert set(doubled.values()) == {2}


def test_an_object_with_the_batched_protocol_of_torch_is_a_map_style_data_set():
    class Table:
        def __len__(self):
            return 6

        def __getitem__(self, index):
            return {"x": torch.tensor(index)}

        def __getitems__(self, indices):
            return [self[index] for index in indices]

        def __iter__(self):
            return (self[index] for index in range(6))

    source = open_source(Table(), **OURS)
    assert sorted(int(x) for batch in source.epoch(0) for x in batch["x"]) == list(range(6))


class Endless(Dataset):
    def __getitem__(self, index):
        return index


class Frame:
    columns = ("a", "b")

    def __array__(self):
        return np.zeros((2, 2))

    def __iter__(self):
        return iter(self.columns)


class Items:
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return [0][index]


@pytest.mark.parametrize(
    "data",
    [
        torch.zeros(3, 2),
        np.zeros((3, 2)),
        Frame(),
        {"x": 1},
        "digits.csv",
        Path("digits.csv"),
        b"",
        None,
        3,
        Augmented,
        lambda: [],
        Endless(),
        Items(),
    ],
    ids=lambda data: type(data).__name__,
)
def test_what_is_no_data_is_refused_with_a_fix(data):
    with pytest.raises(FaultError) as caught:
        open_source(data, **OURS)
    assert caught.value.fault.code == "SL855"
    assert caught.value.fault.fix
    assert caught.value.exit_code == 6


@pytest.mark.parametrize(
    "data",
    [[], TensorDataset(torch.zeros(0)), Augmented(0), DataLoader(Wrapped([])), DataLoader(numbers, sampler=[])],
    ids=lambda data: type(data).__name__,
)
def test_data_that_is_known_to_be_empty_is_refused_when_opened(data):
    assert code(lambda: open_source(data, **OURS)) == "SL851"


def test_a_data_set_smaller_than_a_batch_is_empty_when_the_last_batch_is_dropped():
    assert code(lambda: open_source(Augmented(3), drop_last=True, **OURS)) == "SL851"


@pytest.mark.parametrize("data", [(x for x in ()), iter([])])
def test_empty_data_of_unknown_length_is_refused_in_its_first_epoch(data):
    source = open_source(data, **OURS)
    assert code(lambda: next(source.epoch(0))) == "SL851"


def test_an_iterator_that_is_read_a_second_time_from_its_start_says_why_it_is_empty():
    source = open_source(iter([1]), **OURS)
    assert list(source.epoch(0)) == [1]
    with pytest.raises(FaultError, match="once it was read"):
        next(source.epoch(0))


def test_an_iterable_that_is_empty_in_a_later_epoch_does_not_loop_for_ever():
    class Dwindling:
        epochs = 0

        def __iter__(self):
            self.epochs += 1
            return iter([1] if self.epochs == 1 else [])

    source = open_source(Dwindling(), **OURS)
    assert list(source.epoch(0)) == [1]
    assert code(lambda: list(source.epoch(1))) == "SL851"


def test_an_exception_of_a_data_set_keeps_its_type_and_leaves_the_random_state_untouched():
    class Broken(Augmented):
        def __getitem__(self, index):
            super().__getitem__(index)
            raise LookupError("sample is broken")

    before = state_bytes()
    with pytest.raises(LookupError, match="sample is broken"):
        list(open_source(Broken(), **OURS).epoch(0))
    assert state_bytes() == before


def test_a_batch_is_what_torchs_default_collate_makes():
    class Pairs(Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return torch.full((2,), index), str(index)

    (batch,) = open_source(Pairs(), batch_size=2, seed=0, shuffle=False).epoch(0)
    assert same(batch[0], default_collate([torch.full((2,), 0), torch.full((2,), 1)]))
    assert tuple(batch[1]) == ("0", "1")
