"""A loop that asks for a gradient of a tensor without a graph is told what made it, and where its path was cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Predict = Callable[[nn.Module, Tensor], Tensor]


def frozen_features(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@torch.no_grad()
def decorated(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def detached(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).detach()


def picked(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).argmax(1, keepdim=True).float()


def listed(model: nn.Module, x: Tensor) -> Tensor:
    return torch.tensor(model(x).tolist())


def copied(model: nn.Module, x: Tensor) -> Tensor:
    model(x)
    return x


def distance(predicted: Tensor, x: Tensor) -> Tensor:
    return F.l1_loss(predicted, x[:, : predicted.shape[1]])


def loop(predict: Predict, watched: Any, before: int = 0, **options: Any) -> list[Any]:
    """The faults of a loop that computes its loss from `predict` after some sound iterations."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="does not require grad"), watched(model, sgd, **options) as audit:
        for step in range(before + 1):
            x = torch.randn(4, 3)
            sgd.zero_grad()
            out = predict(model, x) if step == before else model(x)
            distance(out, x).backward()
            sgd.step()
            audit.step()
    return [fault for fault in audit.faults if fault.code == "SL306"]


@pytest.mark.parametrize(
    ("predict", "words"),
    [
        (frozen_features, ["no_grad", "in frozen_features: `return model(x)`", "`0.weight`"]),
        (decorated, ["no_grad", "in decorated: `return model(x)`"]),
        (detached, ["`detach()`", "in detached"]),
        (picked, ["`argmax`", "in picked"]),
        (listed, ["tolist", "in listed"]),
        (copied, ["nothing that it was computed from has a path"]),
    ],
)
def test_the_line_that_cut_the_loss_off_is_named(predict: Predict, words: list[str], watched: Any) -> None:
    (fault,) = loop(predict, watched)
    assert "made at" in fault.where
    assert "in distance: `return F.l1_loss" in fault.where
    assert [word for word in words if word not in fault.why] == []
    assert "loss function" not in fault.where


def test_nothing_is_claimed_where_nobody_looked(watched: Any) -> None:
    (fault,) = loop(copied, watched, before=25)
    assert "made at" not in fault.where
    assert "nothing that it was computed from" not in fault.why


def summed(model: nn.Module, x: Tensor) -> Any:
    return sum(distance(model(row[None]), row[None]).item() for row in x) / len(x)


def in_numpy(model: nn.Module, x: Tensor) -> Any:
    return model(x).detach().numpy().mean()


def unreturned(model: nn.Module, x: Tensor) -> Any:
    distance(model(x), x)


def with_logs(model: nn.Module, x: Tensor) -> Any:
    return distance(model(x), x), {"step": 1}


class Engine:
    """Has no backward: the user's own mistake, and none of a gradient."""


def other(model: nn.Module, x: Tensor) -> Any:
    return Engine()


@pytest.mark.parametrize(
    ("loss", "code", "word"),
    [
        (summed, "SL402", "in summed"),
        (in_numpy, "SL402", "in in_numpy"),
        (unreturned, "SL401", "without `return`"),
        (with_logs, "SL401", "it carries no graph"),
        (other, "", ""),
    ],
)
def test_backward_on_what_is_no_tensor_is_told(loss: Predict, code: str, word: str, watched: Any) -> None:
    model = nn.Linear(3, 2)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(AttributeError), watched(model, sgd) as audit:
        loss(model, torch.randn(4, 3)).backward()
    assert [fault.code for fault in audit.faults] == ([code] if code else [])
    assert all(word in fault.why and "backward()" in fault.where for fault in audit.faults)
