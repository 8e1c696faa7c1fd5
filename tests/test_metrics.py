from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from safeloop.metrics import Accuracy, BinaryAccuracy, MeanAbsoluteError, MeanSquaredError


def test_accuracy_is_a_hit_or_miss_per_sample():
    output = torch.tensor([[0.1, 0.9, 0.0], [0.5, 0.3, 0.2], [0.0, 0.1, 0.9]])
    labels = torch.tensor([1, 1, 2])
    assert Accuracy()(output, labels).tolist() == [True, False, True]
    assert Accuracy(top_k=2)(output, labels).tolist() == [True, True, True]


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_accuracy_of_images_equals_a_plain_loop(top_k):
    output, labels = torch.randn(3, 4, 2, 5), torch.randint(4, (3, 2, 5))
    hits = Accuracy(top_k=top_k)(output, labels)
    assert hits.shape == labels.shape
    for n in range(3):
        for i in range(2):
            for j in range(5):
                best = sorted(range(4), key=lambda c, n=n, i=i, j=j: -output[n, c, i, j])[:top_k]
                assert hits[n, i, j].item() == (labels[n, i, j].item() in best)


def test_binary_accuracy_compares_with_its_threshold():
    output = torch.tensor([[-1.0], [0.2], [0.7]])
    labels = torch.tensor([[0], [1], [0]])
    assert BinaryAccuracy()(output, labels).flatten().tolist() == [True, True, False]
    assert BinaryAccuracy(threshold=0.5)(output, labels.bool()).flatten().tolist() == [True, False, False]


def test_errors_are_per_element():
    output, target = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0]])
    assert MeanSquaredError()(output, target).tolist() == [[4.0, 1.0]]
    assert MeanAbsoluteError()(output, target).tolist() == [[2.0, 1.0]]


@pytest.mark.parametrize("metric", [MeanSquaredError(), MeanAbsoluteError(), BinaryAccuracy()])
def test_shapes_that_would_broadcast_to_all_pairs_are_refused(metric):
    with pytest.raises(ValueError, match=r"\(4,\).*\(4, 1\)"):
        metric(torch.zeros(4, 1), torch.zeros(4))


def test_labels_with_a_dimension_too_many_are_refused():
    with pytest.raises(ValueError, match=r"\(4, 1\).*\(4,\)"):
        Accuracy()(torch.zeros(4, 3), torch.zeros(4, 1, dtype=torch.int64))


@pytest.mark.parametrize("arguments", [{"top_k": 0}, {"top_k": 1.5}, {"k": 1}])
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(ValidationError):
        Accuracy(**arguments)
