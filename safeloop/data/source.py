"""`open_source`: whatever a user gives as data becomes a `Source`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from safeloop.checks.data.source import EmptyData, NotData
from safeloop.data.memory import in_memory, tensor_batches
from safeloop.data.order import Order
from safeloop.data.samples import sample_batches
from safeloop.seeds import derive, isolated_rng


@dataclass(frozen=True, slots=True)
class Source:
    """Batches, epoch by epoch. Counts are None where nobody can know them beforehand."""

    description: str
    num_batches: int | None
    """batches in an epoch"""
    num_samples: int | None
    """samples in an epoch"""
    is_one_shot: bool
    """a generator or another iterator: what it gave is gone, so a second epoch yields nothing"""
    batches: Callable[[int], Iterator[Any]]
    """epoch -> its batches"""

    def epoch(self, n: int) -> Iterator[Any]:
        """The batches of epoch `n`, on the device where the data lives.

        Raises:
            FaultError: SL851 when there are none, at the first `next`.
        """
        is_empty = True
        for batch in self.batches(n):
            is_empty = False
            yield batch
        if is_empty and not (self.is_one_shot and n > 0):
            raise _empty(self.description, self.is_one_shot)


def open_source(
    data: Any, *, batch_size: int, seed: int, shuffle: bool, drop_last: bool = False, num_workers: int = 0
) -> Source:
    """A `Source` of batches from a Dataset, a DataLoader, or any iterable of ready micro-batches.

    A map-style Dataset is batched here: the order is a function of (seed, epoch), a sample's random numbers of (seed,
    epoch, index), whatever `num_workers`; a TensorDataset (or a Subset of one) is indexed in memory. Everything else is
    taken as it is, never reordered: there `batch_size`, `shuffle`, `drop_last` and `num_workers` say nothing (an
    IterableDataset is batched, in its own order). Making iterators leaves the global random state as it was; a
    DataLoader's shuffle is a function of (seed, epoch) too, unless it has a generator of its own.

    Raises:
        FaultError: SL851 when the data is known to be empty, SL855 when it is no data.
    """
    if isinstance(data, DataLoader):
        return _loader_source(data, seed, "DataLoader as given")
    if isinstance(data, IterableDataset):
        return _iterable_dataset_source(data, seed, batch_size, drop_last, num_workers)
    if isinstance(data, Dataset) or hasattr(type(data), "__getitems__"):
        order = Order(_length_of(data), batch_size, seed, shuffle, drop_last)
        return _dataset_source(data, order, num_workers)
    _refuse_what_is_no_data(data)
    return _iterable_source(data, seed)


def _dataset_source(data: Any, order: Order, num_workers: int) -> Source:
    description = f"{type(data).__name__}: {order}"
    if not order.num_batches:
        raise _empty(description)
    memory = in_memory(data)
    if memory is not None:
        batches: Callable[[int], Iterator[Any]] = partial(tensor_batches, *memory, order)
        description += ", in memory"
    else:
        batches = partial(_sample_epoch, data, order, num_workers)
        description += f", {num_workers} workers" if num_workers else ""
    return Source(description, order.num_batches, order.num_visited, False, batches)


def _sample_epoch(data: Any, order: Order, num_workers: int, epoch: int) -> Iterator[Any]:
    return sample_batches(data, order, epoch, num_workers)


def _iterable_dataset_source(data: Any, seed: int, batch_size: int, drop_last: bool, num_workers: int) -> Source:
    if num_workers:
        raise NotData.error(
            f"`{type(data).__name__}` is an IterableDataset, and data.num_workers is {num_workers}",
            why="each worker would read the whole of it, and every sample would come once per worker",
            fix="set data.num_workers to 0, or give a DataLoader of data shared out by get_worker_info()",
        )
    loader: DataLoader[Any] = DataLoader(data, batch_size=batch_size, drop_last=drop_last)
    return _loader_source(loader, seed, f"{type(data).__name__} in its own order, batches of {batch_size}")


def _loader_source(loader: DataLoader[Any], seed: int, description: str) -> Source:
    num_batches = _length(loader)
    if num_batches == 0:
        raise _empty(description)
    is_counted = loader.batch_size is not None and not isinstance(loader.dataset, IterableDataset)
    num_samples = _length(loader.sampler) if is_counted else None
    if num_samples is not None and num_batches is not None and loader.batch_size is not None:
        num_samples = min(num_samples, num_batches * loader.batch_size)
    return Source(description, num_batches, num_samples, False, partial(_private_start, loader, seed))


def _iterable_source(data: Iterable[Any], seed: int) -> Source:
    is_one_shot = isinstance(data, Iterator)
    num_batches = _length(data)
    counted = "micro-batches" if num_batches is None else f"{num_batches} micro-batches"
    description = f"{type(data).__name__} of {counted} as given" + (", can be read once" if is_one_shot else "")
    if num_batches == 0 and not is_one_shot:
        raise _empty(description)
    is_plain = is_one_shot or isinstance(data, (list, tuple))
    batches = (lambda epoch: iter(data)) if is_plain else partial(_private_start, data, seed)
    return Source(description, num_batches, None, is_one_shot, batches)


def _private_start(data: Iterable[Any], seed: int, epoch: int) -> Iterator[Any]:
    """The batches of `data` as they come.

    A shuffling loader draws its order when its iterator is made and at its first `next`: both see random numbers of
    (seed, epoch) in the place of the global ones.
    """
    with isolated_rng(derive(seed, "loader", epoch)):
        batches = iter(data)
        try:
            first = next(batches)
        except StopIteration:
            return
    yield first
    yield from batches


def _refuse_what_is_no_data(data: Any) -> None:
    kind = f"{type(data).__module__}.{type(data).__qualname__}".removeprefix("builtins.")
    if isinstance(data, Tensor) or hasattr(type(data), "__array__"):
        shape = tuple(getattr(data, "shape", ()))
        what = f"data is a `{kind}` of shape {shape}"
        fix = "to batch its rows: torch.utils.data.TensorDataset(x) or TensorDataset(x, y); for one micro-batch: [x]"
    elif isinstance(data, (Mapping, str, bytes)):
        what = f"data is a `{kind}`"
        fix = "give a torch.utils.data.Dataset, a DataLoader, or a list of ready micro-batches (for one: [data])"
    elif callable(data) and not isinstance(data, Iterable):
        what = f"data is `{getattr(data, '__qualname__', kind)}` itself, and not what it returns"
        fix = "call it: data=make_data(), not data=make_data"
    elif hasattr(type(data), "__iter__"):
        return
    elif hasattr(type(data), "__getitem__"):
        what = f"data is a `{kind}`: it has items, and nothing says whether they are samples or ready micro-batches"
        fix = "inherit torch.utils.data.Dataset when the items are samples; give list(data) when they are micro-batches"
    else:
        what = f"data is a `{kind}`, which cannot be iterated"
        fix = "give a torch.utils.data.Dataset, a DataLoader, or an iterable of ready micro-batches"
    raise NotData.error(what, fix=fix)


def _length_of(dataset: Any) -> int:
    length = _length(dataset)
    if length is None:
        raise NotData.error(
            f"`{type(dataset).__name__}` is a map-style Dataset without a length",
            fix="add `__len__`, or inherit torch.utils.data.IterableDataset and write `__iter__`",
        )
    return length


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


def _empty(description: str, is_one_shot: bool = False) -> Exception:
    return EmptyData.error(
        f"the data holds no batch ({description})",
        why="an iterator is empty once it was read" if is_one_shot else "",
        fix="give a list, which can be read again"
        if is_one_shot
        else "check the path and the filter of the data; data.drop_last needs at least data.batch_size samples",
    )
