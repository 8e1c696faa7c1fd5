from __future__ import annotations

import sys

import pytest
import torch
from torch.utils.data import TensorDataset

from safeloop.data.source import open_source
from safeloop.datasets import Digits

pytest.importorskip("sklearn")


def test_digits_are_images_in_0_to_1_with_labels_0_to_9():
    for split, length in (("train", 1437), ("test", 360)):
        images, labels = Digits(split).tensors
        assert images.shape == (length, 1, 8, 8)
        assert images.dtype == torch.float32
        assert images.min() == 0
        assert images.max() == 1
        assert labels.dtype == torch.int64
        assert labels.shape == (length,)
        assert labels.unique().tolist() == list(range(10))


def test_the_splits_are_disjoint_complete_and_always_the_same():
    from sklearn.datasets import load_digits

    whole = sorted(map(tuple, load_digits().data.tolist()))
    parts = torch.cat([Digits(split, flat=True).tensors[0] for split in ("train", "test")])
    assert sorted(map(tuple, (parts * 16).tolist())) == whole
    torch.manual_seed(5)
    again = Digits("test")
    assert all(map(torch.equal, again.tensors, Digits("test").tensors))
    assert again.tensors[1][:6].tolist() == [3, 2, 4, 3, 3, 5]


def test_flat_digits_are_the_same_images():
    assert torch.equal(Digits(flat=True).tensors[0].view(-1, 1, 8, 8), Digits().tensors[0])


def test_loading_leaves_the_random_state_untouched():
    before = torch.get_rng_state()
    Digits()
    assert torch.equal(torch.get_rng_state(), before)


def test_digits_are_indexed_in_memory():
    assert isinstance(Digits(), TensorDataset)
    assert "in memory" in open_source(Digits(), batch_size=64, seed=0, shuffle=True).description


def test_another_split_is_refused():
    with pytest.raises(ValueError, match="validation"):
        Digits("validation")


def test_a_missing_scikit_learn_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"safeloop\[examples\]"):
        Digits()
