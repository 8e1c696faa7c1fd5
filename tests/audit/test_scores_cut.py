"""Attention whose scores lose their path by `.data`, while all parameters keep another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
"""of queries, keys and values [B, T, 4], all made by one layer"""


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    future = torch.triu(torch.ones(q.shape[1], q.shape[1], dtype=torch.bool), 1)
    scores = (q @ k.transpose(1, 2) / 2).data.masked_fill(future, float("-inf"))
    return F.dropout(F.softmax(scores, dim=-1), 0.1) @ v


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("btd,bsd->bts", q, k)
    bias = torch.arange(q.shape[1]).float()
    return torch.einsum("bts,bsd->btd", torch.softmax(scores.data - bias, 2), v)


def pooled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * k).sum(-1, keepdim=True)
    scores = scores.data
    return torch.bmm(scores.softmax(1).transpose(1, 2), v)


BAD: list[Mix] = [masked, einsum, pooled]


def masked_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(1, 2)
    scores.data.masked_fill_(torch.eye(q.shape[1], dtype=torch.bool), -1e9)
    return scores.softmax(-1) @ v


def constant_on_purpose(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(1, 2)).detach().softmax(-1) @ v


def routed_by_agreement(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    fixed, b = v.data, torch.zeros(v.shape[0], 1, v.shape[1])
    for _ in range(2):
        s = torch.bmm(b.softmax(-1), fixed)
        b = b + torch.bmm(s, fixed.transpose(1, 2))
    return torch.bmm(b.softmax(-1), v)


def looked_at_too(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(1, 2)
    return scores.data.softmax(-1) @ v + 0.1 * scores.mean()


def shifted_by_its_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(1, 2)
    return (scores - scores.data.amax(-1, keepdim=True)).softmax(-1) @ v


def only_shown(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(1, 2)
    _ = (scores.data.softmax(-1) @ v).mean().item()
    with torch.no_grad():
        _ = scores.data.softmax(-1) @ v
    return scores.softmax(-1) @ v


def of_constants(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    table = torch.eye(4)
    return v + (q.data.softmax(-1) @ table) * k.sum()


GOOD: list[Mix] = [
    masked_in_place,
    constant_on_purpose,
    routed_by_agreement,
    looked_at_too,
    shifted_by_its_maximum,
    only_shown,
    of_constants,
]


class Fused(nn.Module):
    """attention with one layer for queries, keys and values"""

    def __init__(self, mix: Mix) -> None:
        super().__init__()
        self.first, self.qkv, self.last = nn.Linear(4, 4), nn.Linear(4, 12), nn.Linear(4, 3)
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mix(*self.qkv(self.first(x)).chunk(3, -1)).mean(1))


def _faults(watched: Any, mix: Mix) -> list[Any]:
    torch.manual_seed(0)
    model = Fused(mix)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with watched(model, optimizer) as audit:
        for _ in range(6):
            loss = F.cross_entropy(model(torch.randn(8, 5, 4)), torch.randint(0, 3, (8,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            audit.step()
    return [fault for fault in audit.faults if fault.code == "SL314"]


@pytest.mark.parametrize("mix", BAD)
def test_scores_without_a_path_are_named_with_their_line(watched: Any, mix: Mix) -> None:
    (fault,) = _faults(watched, mix)
    assert f"in {mix.__name__}" in fault.where


@pytest.mark.parametrize("mix", GOOD)
def test_scores_with_a_path_or_meant_to_have_none_are_not(watched: Any, mix: Mix) -> None:
    assert _faults(watched, mix) == []
