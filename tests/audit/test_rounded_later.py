"""Operations without a derivative that come into a model during the run; and those that are meant, which look alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Change = Callable[[Tensor], Tensor]


class Changed(nn.Module):
    """A net the weights or the code of which go through something, once `change` is set."""

    def __init__(self, *, is_conv: bool) -> None:
        super().__init__()
        self.encoder: nn.Module = nn.Conv1d(2, 4, 3, padding=1) if is_conv else nn.Linear(6, 4)
        self.head = nn.Linear(24 if is_conv else 4, 3)
        self.is_conv = is_conv
        self.change: Change = lambda x: x

    def forward(self, x: Tensor) -> Tensor:
        if self.is_conv:
            weight = self.change(self.encoder.weight)
            h = F.conv1d(x.view(len(x), 2, 6), weight, self.encoder.bias, padding=1)
            return self.head(h.relu().flatten(1))
        return self.head(self.change(self.encoder(x)))


def run(watched: Any, change: Change | None, *, is_conv: bool, when: Callable[[int], bool]) -> list[Any]:
    torch.manual_seed(0)
    model = Changed(is_conv=is_conv)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with watched(model, optimizer) as audit:
        for i in range(18):
            model.change = change if change is not None and when(i) else lambda x: x
            x = torch.randn(8, 12 if is_conv else 6)
            loss = F.cross_entropy(model(x), torch.randint(0, 3, (8,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            audit.step()
    return list(audit.faults)


def binarised(weight: Tensor) -> Tensor:
    return weight.sign() * weight.detach().abs().mean()


def floored(code: Tensor) -> Tensor:
    return torch.floor(4 * code) / 4


def straight(code: Tensor) -> Tensor:
    return code + (floored(code) - code).detach()


@pytest.mark.parametrize(("change", "is_conv"), [(binarised, True), (floored, False)])
def test_what_has_no_derivative_and_comes_later_is_named(watched: Any, change: Change, is_conv: bool) -> None:
    (fault,) = run(watched, change, is_conv=is_conv, when=lambda i: i >= 8)
    assert fault.code == "SL503"
    assert fault.severity == "warning"
    assert "encoder.weight" in fault.what
    assert "on the last 10 steps, and was not before" in fault.what
    assert f"in {change.__name__}" in fault.where


@pytest.mark.parametrize(
    ("change", "is_conv", "when"),
    [
        (straight, False, lambda i: i >= 8),
        (binarised, True, lambda i: i % 3 != 0),  # mixed with steps that train it
        (floored, False, lambda i: 4 <= i < 12),  # taken out again
        (floored, False, lambda i: i >= 15),  # too late to tell
        (lambda code: (code - 100).relu() + code.detach(), False, lambda i: i >= 8),  # values may revive it
    ],
)
def test_what_lets_gradients_through_again_is_not(
    watched: Any, change: Change, is_conv: bool, when: Callable[[int], bool]
) -> None:
    assert run(watched, change, is_conv=is_conv, when=when) == []


def test_an_encoder_that_is_frozen_when_its_code_is_rounded_is_well(watched: Any) -> None:
    torch.manual_seed(0)
    model = Changed(is_conv=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with watched(model, optimizer) as audit:
        for i in range(18):
            if i == 8:
                model.encoder.requires_grad_(False)
                model.change = floored
                optimizer = torch.optim.Adam(model.head.parameters(), lr=0.01)
            loss = F.cross_entropy(model(torch.randn(8, 6)), torch.randint(0, 3, (8,)))
            model.zero_grad()
            loss.backward()
            optimizer.step()
            audit.step()
    assert [fault for fault in audit.faults if fault.code == "SL503"] == []
