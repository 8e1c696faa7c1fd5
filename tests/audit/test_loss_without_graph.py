"""A loss without a graph, by torch's own error: the line where the path to the parameters ended is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def count(scores: Tensor, labels: Tensor) -> Tensor:
    hit = scores.argmax(1) == labels
    return 1 - hit.float().mean()


def threshold(scores: Tensor, labels: Tensor) -> Tensor:
    wrong = (scores.sigmoid()[:, 0] > 0.5) != labels.bool()
    return wrong.float().mean()


def cut(scores: Tensor, labels: Tensor) -> Tensor:
    scores = scores.detach()
    return F.cross_entropy(scores, labels)


@pytest.mark.parametrize(
    ("loss_of", "line"),
    [(count, "scores.argmax(1)"), (threshold, "> 0.5"), (cut, "scores.detach()")],
)
def test_the_line_where_the_path_ends_is_named(
    watched: Any, loss_of: Callable[[Tensor, Tensor], Tensor], line: str
) -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    audits = []
    with pytest.raises(RuntimeError), watched(model, optimizer) as audit:
        audits.append(audit)
        loss = loss_of(model(torch.randn(8, 4)), torch.randint(0, 2, (8,)))
        loss.backward()
    (fault,) = [fault for fault in audits[0].faults if fault.code == "SL306"]
    assert line in fault.where
    assert loss_of.__name__ in fault.where
