from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from safeloop.data.count import count
from safeloop.evaluation import evaluate
from safeloop.faults import FaultError

MODEL = nn.Linear(1, 1)


def run(metrics, batches, count=count, **more):
    return evaluate(metrics, MODEL, batches, count=count, **more)


def fault(metrics, batches, **more):
    with pytest.raises(FaultError) as caught:
        run(metrics, batches, **more)
    return caught.value.fault


class Mean:
    """A metric object, as torchmetrics makes them."""

    def __init__(self):
        self.reset()

    def update(self, values):
        self.values += values.tolist()

    def compute(self):
        return torch.tensor(sum(self.values) / len(self.values))

    def reset(self):
        self.values = []


@settings(deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=50),
    size=st.integers(1, 9),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool]),
)
def test_a_per_sample_metric_equals_that_of_the_whole_set_over_unequal_batches(values, size, dtype):
    whole = torch.tensor(values).to(dtype)
    result = run(lambda batch: {"value": batch}, whole.split(size))
    exact = math.fsum(float(v) for v in whole) / len(whole)
    assert result["value"] == pytest.approx(exact, rel=1e-12, abs=1e-12 * float(whole.double().abs().max()) + 1e-300)


@settings(deadline=None)
@given(rows=st.integers(1, 20), size=st.integers(1, 6))
def test_elements_are_pooled_whatever_the_number_of_dimensions(rows, size):
    whole = torch.randn(rows, 3, 2, dtype=torch.float64)
    result = run(lambda batch: {"value": batch}, whole.split(size))
    assert result["value"] == pytest.approx(whole.mean().item(), abs=1e-12)


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_a_single_number_is_weighted_by_the_samples_of_its_batch(sizes):
    batches = [torch.randn(size, dtype=torch.float64) for size in sizes]
    result = run(lambda b: {"tensor": b.mean(), "float": b.mean().item(), "numpy": b.mean().numpy()}, batches)
    exact = torch.cat(batches).mean().item()
    assert result == pytest.approx(dict.fromkeys(("tensor", "float", "numpy"), exact), abs=1e-12)


def test_the_users_count_weighs_single_numbers_and_is_not_asked_for_others():
    batches = [torch.tensor([1.0]), torch.tensor([4.0])]
    assert run(lambda b: {"a": b.sum()}, batches, count=lambda b: int(b)) == {"a": (1 + 16) / 5}

    def refuse(batch):
        raise AssertionError("asked for the count")

    assert run(lambda b: {"a": b}, batches, count=refuse) == {"a": 2.5}


def test_a_batch_without_samples_adds_nothing_even_where_its_mean_is_nan():
    batches = [torch.ones(2), torch.ones(0)]
    assert run(lambda b: {"mean": b.mean(), "each": b}, batches) == {"mean": 1.0, "each": 1.0}


def test_numbers_arrays_and_gradients_are_taken():
    weight = torch.ones(2, requires_grad=True)
    result = run(
        lambda b: {
            "bool": True,
            "int": 3,
            "array": np.array([1, 2, 3], dtype=np.uint8),
            "flags": np.array([True, False]),
            "scalar": np.float32(0.5),
            "leaf": weight,
            "strided": torch.arange(6.0)[::2],
        },
        [torch.zeros(2)],
    )
    assert result == {"bool": 1, "int": 3, "array": 2, "flags": 0.5, "scalar": 0.5, "leaf": 1, "strided": 2}


def test_results_come_in_the_order_of_the_first_batch():
    first, mean = [True], Mean()

    def metrics(b):
        mean.update(b)
        values = {"z": b, "object": mean, "a": b.sum()}
        return values if first and first.pop() else dict(reversed(values.items()))

    assert list(run(metrics, [torch.ones(1)] * 2)) == ["z", "object", "a"]


def test_a_nan_is_not_hidden():
    assert math.isnan(run(lambda b: {"a": b}, [torch.tensor([1.0, float("nan")]), torch.ones(1)])["a"])


def test_a_metric_object_is_computed_once_at_the_end_and_reset():
    mean = Mean()

    def metrics(b):
        mean.update(b)
        return {"mean": mean}

    for _ in range(2):
        assert run(metrics, torch.arange(5.0).split(2)) == {"mean": 2.0}
        assert mean.values == []


def test_a_metric_object_is_reset_when_a_later_batch_fails():
    mean = Mean()

    def metrics(b):
        mean.update(b)
        if len(b) == 1:
            raise LookupError
        return {"mean": mean}

    with pytest.raises(LookupError):
        run(metrics, torch.arange(5.0).split(2))
    assert mean.values == []


def test_a_collection_that_computes_a_dict_is_spread_over_names():
    class Collection(Mean):
        def compute(self):
            return {"precision": torch.tensor([0.5]), "recall": 0.25}

    collection = Collection()
    assert run(lambda b: {"all": collection}, [0]) == {"all/precision": 0.5, "all/recall": 0.25}


def test_values_stay_on_the_device_until_the_end(monkeypatch):
    def refuse(*_):
        raise AssertionError("moved to the host")

    batches = [torch.ones(3), torch.ones(2)]

    def metrics(b):
        for name in ("item", "tolist", "__float__", "__int__", "__bool__", "cpu", "numpy"):
            monkeypatch.setattr(torch.Tensor, name, refuse)
        return {"each": b, "mean": b.sum()}

    def all_batches():
        yield from batches
        monkeypatch.undo()

    assert run(metrics, all_batches()) == {"each": 1.0, "mean": pytest.approx(2.6)}


ONE = [torch.ones(2)]
TWO = [torch.ones(2), torch.ones(1)]


@pytest.mark.parametrize(
    ("metrics", "batches", "named"),
    [
        (lambda b: b.mean(), ONE, "torch.Tensor"),
        (lambda b: None, ONE, "NoneType"),
        (lambda b: [("a", b)], ONE, "list"),
        (lambda b: {}, ONE, "empty mapping"),
        (lambda b: {3: b}, ONE, "3"),
        (lambda b: {"recall": "high"}, ONE, "recall"),
        (lambda b: {"recall": None}, ONE, "recall"),
        (lambda b: {"recall": [1.0, 2.0]}, ONE, "list"),
        (lambda b: {"recall": np.array(["a"])}, ONE, "recall"),
        (lambda b: {"recall": b + 1j}, ONE, "complex"),
        (lambda b: {"recall": (b, 2)}, ONE, "tuple"),
        (lambda b: {"recall": b.squeeze()}, TWO, "recall"),
        (lambda b: {"recall": b if len(b) == 2 else b[None]}, TWO, "recall"),
        (lambda b: {"a": b} if len(b) == 2 else {"a": b, "recall": b}, TWO, "recall"),
        (lambda b: {"a": b, "recall": b} if len(b) == 2 else {"a": b}, TWO, "recall"),
        (lambda b: {"recall": b[b > 5]}, TWO, "no element"),
        (lambda b: {"recall": Mean()}, TWO, "Mean"),
        (lambda b: {"recall": Mean() if len(b) == 1 else b}, TWO, "Mean"),
    ],
)
def test_what_cannot_be_pooled_is_a_fault_that_names_it(metrics, batches, named):
    found = fault(metrics, batches, where="net.py:3")
    assert found.code == "SL701"
    assert named in found.what
    assert "net.py:3" in found.where
    assert found.fix


def test_a_metric_object_that_gives_no_single_number_is_a_fault():
    class PerClass(Mean):
        def compute(self):
            return torch.ones(3)

    metric = PerClass()
    assert "(3,)" in fault(lambda b: {"per_class": metric}, ONE).what


def test_a_metric_object_on_one_batch_and_a_tensor_on_the_next_is_a_fault():
    mean = Mean()
    assert fault(lambda b: {"a": mean if len(b) == 2 else b}, TWO).code == "SL701"


def test_a_weight_of_zero_over_all_batches_is_a_fault():
    assert "no element" in fault(lambda b: {"a": b.sum()}, ONE, count=lambda b: 0).what


def test_evaluation_data_without_a_batch_is_a_fault():
    assert fault(lambda b: {"a": b}, []).code == "SL851"


@pytest.mark.cuda
def test_a_cuda_evaluation_does_not_synchronise_per_batch():
    batches = [torch.ones(3, device="cuda") for _ in range(4)]

    def all_batches():
        torch.cuda.set_sync_debug_mode("error")
        yield from batches
        torch.cuda.set_sync_debug_mode("default")

    assert run(lambda b: {"each": b, "mean": b.mean()}, all_batches()) == {"each": 1.0, "mean": 1.0}
