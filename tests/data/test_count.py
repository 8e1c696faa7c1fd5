from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from safeloop.data.count import count


@dataclass
class Sample:
    name: str
    image: torch.Tensor


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (torch.zeros(5, 2), 5),
        (torch.zeros(()), 1),
        ((torch.zeros(3), torch.zeros(4)), 3),
        ([torch.zeros(0, 2)], 0),
        ({"name": "a", "x": [torch.zeros(6)]}, 6),
        (Sample("a", torch.zeros(7)), 7),
        (["a", "b"], 1),
        ([], 1),
    ],
)
def test_a_batch_counts_the_leading_dimension_of_its_first_tensor(batch, expected):
    assert count(batch) == expected
