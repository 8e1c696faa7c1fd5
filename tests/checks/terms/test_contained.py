"""Terms that are returned beside a sum of them, and sums that only look so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safeloop.checks.terms.contained import TermContainsAnother
from safeloop.checks.views import TermsView

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


def found(make: Callable[[Tensor], dict[str, Any]], **changes: Any) -> list[tuple[str, ...]]:
    model = nn.Linear(4, 4)
    parameters = dict(model.named_parameters())
    view = {"weights": {}, "declared": (), "constants_allowed": frozenset(), "trains": {}, "source": "train.py:3"}
    view |= {"parameters": parameters, "owned": frozenset(parameters)} | changes
    return [fault.names for fault in TermContainsAnother.find(TermsView(terms=make(model(X)), **view))]


def parts_of(out: Tensor) -> tuple[Tensor, Tensor]:
    return F.mse_loss(out, X), out.square().mean()


SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": lambda a, b: a + b,
    "weighted": lambda a, b: a / 2 - 0.1 * b,
    "python sum": lambda a, b: sum([a, b]),
    "stacked": lambda a, b: torch.stack([a, b]).mean(),
    "with more": lambda a, b: (a + a.detach() + 1) * 2 + b,
}


@pytest.mark.parametrize("name", SUMS)
def test_a_total_beside_its_parts_is_told_with_them(name: str) -> None:
    def make(out: Tensor) -> dict[str, Any]:
        a, b = parts_of(out)
        return {"a": a, "total": SUMS[name](a, b), "b": b}

    assert found(make) == [("total", "a", "b")]
    assert found(make, weights={"b": 0.0}) == [("total", "a")]
    assert found(make, weights={"total": 0.0}) == []


def test_parts_alone_and_a_detached_part_are_well() -> None:
    def make(out: Tensor) -> dict[str, Any]:
        a, b = parts_of(out)
        return {"total": a + b, "a": a.detach(), "ratio": a * b, "root": a.sqrt()}

    assert found(make) == []
    assert found(lambda out: dict(zip("ab", parts_of(out), strict=True))) == []


def test_terms_that_each_train_their_own_are_left_alone() -> None:
    def make(out: Tensor) -> dict[str, Any]:
        a, b = parts_of(out)
        return {"generator": a, "critic": a + b}

    assert found(make, trains={"generator": ["weight"], "critic": ["bias"]}) == []
    assert found(make, trains={"generator": ["weight"]}) == [("critic", "generator")]
