"""Checkpoints, `.data` and gradients of non-leaves, in the ways in which people write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import safeloop as sl

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
Y = X[:, :1] - X[:, 1:2]
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
VOLUMES = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(3))


def block(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), norm, nn.ReLU())


def not_reentrant(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x, use_reentrant=False)


def reentrant(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x.clone().requires_grad_(), use_reentrant=True)


def in_segments(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint_sequential(model, 2, x.clone().requires_grad_(), use_reentrant=False)


CHECKPOINTED: dict[str, tuple[Any, Any, Any]] = {
    "not reentrant": (not_reentrant, lambda: block(nn.BatchNorm1d(6)), X),
    "reentrant": (reentrant, lambda: block(nn.BatchNorm1d(6)), X),
    "2d": (not_reentrant, lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), IMAGES),
    "3d": (not_reentrant, lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4)), VOLUMES),
    "segments": (in_segments, lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6)), X),
}


def from_a_checkpoint(name: str) -> Callable[[], Any]:
    run, build, x = CHECKPOINTED[name]

    def make() -> Any:
        model = build()
        return model, lambda i: (run(model, x) - 1).square().mean()

    return make


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_batch_norm_in_a_checkpoint_is_told(name: str, audited: Any, trained: Any) -> None:
    for run in (audited, trained):
        faults = run(from_a_checkpoint(name), steps=2)
        assert [(fault.code, fault.names) for fault in faults] == [("SL312", ("1",))]


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm(6), nn.BatchNorm1d(6).eval(), nn.BatchNorm1d(6, track_running_stats=False), nn.GroupNorm(2, 6)],
    ids=["LayerNorm", "eval mode", "without statistics", "GroupNorm"],
)
def test_other_normalisations_in_a_checkpoint_are_not_told(norm: nn.Module, audited: Any) -> None:
    def make() -> Any:
        model = block(norm)
        return model, lambda i: (not_reentrant(model, X) - 1).square().mean()

    assert audited(make, steps=2) == []


class Skip(nn.Module):
    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.inner, self.join = nn.Linear(6, 6), nn.Linear(6, 6), join
        self.last = nn.LazyLinear(1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(self.join(h, self.inner(h).relu()))


BY_DATA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda h, f: f + h.data,  # guilty
    "first": lambda h, f: h.data + f,  # guilty
    "cat": lambda h, f: torch.cat([h.data, f], 1),  # guilty
    "in place": lambda h, f: (f * 1.0).add_(h.data),  # guilty
    "torch.add": lambda h, f: torch.add(f, h.data),  # guilty
    "stack": lambda h, f: torch.stack([f, h.data]).mean(0),  # guilty
}
NOT_BY_DATA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "detached": lambda h, f: f + h.detach(),
    "whole": lambda h, f: f + h,
    "straight-through": lambda h, f: f + (h.round() - h).data,
    "noise": lambda h, f: f + 0.1 * h.data.std() * torch.randn_like(f),
    "another input": lambda h, f: f + X.data,
    "scaled by the value": lambda h, f: f / h.data.norm(),
}


@pytest.mark.parametrize("name", BY_DATA | NOT_BY_DATA)
def test_a_skip_connection_by_data_is_told(name: str, audited: Any) -> None:
    def make() -> Any:
        model = Skip((BY_DATA | NOT_BY_DATA)[name])
        model(X)
        return model, lambda i: F.mse_loss(model(X), Y)

    faults = audited(make, steps=3)
    assert [fault.code for fault in faults] == (["SL314"] if name in BY_DATA else [])
    assert all("# guilty" in fault.where for fault in faults)


def reads(line: Callable[[Tensor], Any], lenient: bool = False) -> list[sl.Fault]:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        hidden = model[0](X)
        model[1](hidden).square().mean().backward()
        try:
            line(hidden)
        except (TypeError, AttributeError):
            assert not lenient
        optimizer.step()
    return list(audit.faults)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("line", "severity"),
    [
        (lambda h: h - 0.1 * h.grad, "error"),
        (lambda h: h.grad.norm(), "error"),
        (lambda h: h.grad[0], "error"),
        (lambda h: torch.abs(h.grad), "warning"),
        (lambda h: print(h.grad), "warning"),
    ],
    ids=["update", "norm", "index", "argument", "print"],
)
def test_the_gradient_of_a_non_leaf_is_told(line: Callable[[Tensor], Any], severity: str) -> None:
    assert [(fault.code, fault.severity) for fault in reads(line)] == [("SL315", severity)]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    "line",
    [
        lambda h: h.grad is None,
        lambda h: h.grad is not None and h.grad.norm(),
        lambda h: getattr(h, "grad", None),
        lambda h: hasattr(h, "grad"),
        lambda h: h.grad or 0,
        lambda h: repr(h),
        lambda h: h.retain_grad(),
        lambda h: torch.zeros_like(h) if h.grad is None else h.grad,
    ],
)
def test_a_line_that_reckons_with_none_is_not_told(line: Callable[[Tensor], Any]) -> None:
    assert reads(line, lenient=True) == []
