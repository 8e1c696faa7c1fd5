"""NaN and infinity in a loop of one's own: the line at which they were born, and what is not told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safeloop.audit.updates import GLANCE

STEPS = 8


def run(watched: Any, loss_of: Callable[[nn.Module, Tensor, int], Tensor], steps: int = STEPS, **options: Any) -> list:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watched(model, optimizer, **options) as audit:
        for step in range(steps):
            loss = loss_of(model, torch.randn(5, 4), step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            audit.step()
    return list(audit.faults)


def log_of_zero(model: nn.Module, x: Tensor, step: int) -> Tensor:
    p = torch.softmax(model(x) * (1e4 if step == 4 else 1.0), -1)
    return -(torch.full_like(p, 1 / 3) * torch.log(p)).sum(-1).mean()


def no_targets(model: nn.Module, x: Tensor, step: int) -> Tensor:
    target = torch.full((5,), -100 if step == 4 else 1)
    return F.cross_entropy(model(x), target)


def one_sample(model: nn.Module, x: Tensor, step: int) -> Tensor:
    rewards = x[: 1 if step == 4 else 5, 0]
    scale = rewards.std()
    return (model(x).mean() * (rewards / scale).sum()).square()


def hidden_row(model: nn.Module, x: Tensor, step: int) -> Tensor:
    allowed = torch.ones(5, 3, dtype=torch.bool)
    allowed[0] = step != 4
    weights = model(x).masked_fill(~allowed, -torch.inf).softmax(-1)
    return weights.square().mean()


def written_in_place(model: nn.Module, x: Tensor, step: int) -> Tensor:
    y = model(x)
    y.div_(torch.zeros(()) if step == 4 else torch.ones(()))
    return y.square().mean()


@pytest.mark.filterwarnings("ignore:std")
@pytest.mark.parametrize(
    ("loss_of", "line", "why"),
    [
        (log_of_zero, "torch.log(p)", "edge of its domain"),
        (one_sample, "rewards.std()", "one value only"),
        (written_in_place, "y.div_(", "it gave"),
    ],
)
def test_a_nan_of_the_forward_is_told_with_its_line_and_its_trap(
    watched: Any, loss_of: Any, line: str, why: str
) -> None:
    faults = {fault.code: fault for fault in run(watched, loss_of)}
    assert set(faults) == {"SL405", "SL501"}
    assert "born in" in faults["SL405"].where
    assert line in faults["SL405"].where.partition("born in")[2]
    assert why in faults["SL405"].why
    assert "born in" not in faults["SL501"].where, "what the backward pass makes of a NaN says nothing"


def test_of_a_finite_loss_the_line_is_that_of_the_derivative(watched: Any) -> None:
    def root_of_zero(model: nn.Module, x: Tensor, step: int) -> Tensor:
        y = model(x) * float(step != 4)
        return y.square().sum(-1).sqrt().mean()

    (fault,) = run(watched, root_of_zero)
    assert fault.code == "SL501"
    assert "born in `SqrtBackward0`" in fault.where


def test_infinities_that_are_meant_and_hidden_are_not_told(watched: Any) -> None:
    def masked(model: nn.Module, x: Tensor, step: int) -> Tensor:
        y = model(x)
        scores = y + torch.zeros(3).index_fill(0, torch.tensor([1]), -torch.inf)
        best = torch.full((5,), -torch.inf).maximum(y[:, 0])
        safe = torch.where(y > 0, torch.log(y.detach().clamp(min=0)), torch.zeros(()))
        return scores.softmax(-1).square().mean() + best.square().mean() + (safe * y).mean() + y.square().mean()

    assert run(watched, masked) == []


def test_a_loop_that_leaves_such_updates_out_is_sound(watched: Any) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with watched(model, optimizer) as audit:
        for step in range(STEPS):
            loss = model(torch.randn(5, 4)).square().mean()
            if step == 3:
                loss = loss * torch.log(torch.zeros(()))
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if torch.isfinite(norm):
                optimizer.step()
            audit.step()
    assert audit.faults == ()


@pytest.mark.parametrize(
    ("loss_of", "line", "why"),
    [
        (no_targets, "F.cross_entropy(model(x), target)", "no target at all"),
        (hidden_row, "softmax(-1)", "-inf throughout"),
    ],
)
def test_a_nan_loss_whose_gradients_are_finite_is_a_warning(watched: Any, loss_of: Any, line: str, why: str) -> None:
    (fault,) = run(watched, loss_of)
    assert (fault.code, fault.severity) == ("SL405", "warning")
    assert line in fault.where.partition("born in")[2]
    assert why in fault.why


@pytest.mark.parametrize("poison", [log_of_zero, written_in_place])
def test_on_a_late_step_the_parameters_are_told_before_it(watched: Any, poison: Any) -> None:
    (fault,) = run(watched, lambda model, x, step: poison(model, x, step - 22), steps=30)
    assert fault.code == "SL501"
    assert any(f"step {step}" in fault.where for step in range(26, 26 + GLANCE)), "a NaN stays once it is there"
    assert "`0.weight`" in fault.what
    assert 'level="full"' in fault.fix


def root(model: nn.Module, x: Tensor, step: int) -> Tensor:
    return (model(x) * float(step != 4)).square().sum(-1).sqrt().mean()


def empty_bag(model: nn.Module, x: Tensor, step: int) -> Tensor:
    seen = torch.arange(3)[None] < torch.tensor([3, 2, 1, 1, 0 if step == 4 else 1])[:, None]
    weights = (model(x) + torch.zeros(5, 3).masked_fill(~seen, -torch.inf)).softmax(-1)
    return torch.where(seen.any(-1, keepdim=True), weights, 0.0).square().mean()


def no_token(model: nn.Module, x: Tensor, step: int) -> Tensor:
    kept = torch.ones(5) if step != 4 else torch.zeros(5)
    return (model(x).square().sum(-1) * kept).sum() / kept.sum()


def inverse(model: nn.Module, x: Tensor, step: int) -> Tensor:
    spread = model(x).square().sum(-1) * float(step != 4)
    return (1 / spread).clamp(max=1e6).mean()


def angle(model: nn.Module, x: Tensor, step: int) -> Tensor:
    cosine = F.cosine_similarity(model(x), torch.ones(5, 3), dim=-1)
    return torch.acos(cosine if step != 4 else cosine / cosine.detach()).mean()


@pytest.mark.parametrize(
    ("loss_of", "line"),
    [
        (root, ".sqrt().mean()"),
        (empty_bag, ".softmax(-1)"),
        (no_token, "/ kept.sum()"),
        (inverse, "(1 / spread)"),
        (angle, "torch.acos("),
        (log_of_zero, "torch.log(p)"),
    ],
)
def test_on_a_late_step_the_operations_that_were_near_their_edge_are_told(
    watched: Any, loss_of: Any, line: str
) -> None:
    (fault,) = run(watched, lambda model, x, step: loss_of(model, x, step - 22), steps=50)
    assert fault.code == "SL501"
    told = fault.where.partition("nearest to the edge of its domain earlier:")[2]
    assert line in told


def test_what_has_no_edge_is_no_suspect(watched: Any) -> None:
    def overflow(model: nn.Module, x: Tensor, step: int) -> Tensor:
        whole = (model(x) ** 2 / 4).mean()
        return whole * (torch.inf if step == 26 else 1.0)

    (fault,) = run(watched, overflow, steps=50)
    assert fault.code == "SL501"
    assert "nearest" not in fault.where


def test_every_step_is_looked_at_where_that_is_wanted(watched: Any) -> None:
    faults = run(watched, lambda model, x, step: log_of_zero(model, x, step - 22), steps=30, level="full")
    assert "torch.log(p)" in next(fault.where for fault in faults if fault.code == "SL405")


def test_at_the_end_the_weights_show_what_no_sample_did(watched: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(3, 5000))
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.01)
    model[:2].requires_grad_(False)
    with watched(model, optimizer) as audit:
        for step in range(24):
            optimizer.zero_grad()
            (model(torch.randn(5, 4)).square().mean() * (torch.nan if step == 23 else 1.0)).backward()
            optimizer.step()
            audit.step()
    (fault,) = audit.faults
    assert fault.code == "SL501"
    assert "`2.weight`" in fault.what


def test_a_scaler_that_skips_every_step_is_told_with_the_line(watched: Any) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with watched(model, optimizer) as audit:
        for _ in range(10):
            optimizer.zero_grad()
            y = model(torch.randn(5, 4))
            distance = (y[:, None] - y[None]).square().sum(-1).sqrt()
            scaler.scale(distance.mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            audit.step()
    (fault,) = audit.faults
    assert fault.code == "SL643"
    assert "born in `SqrtBackward0`" in fault.where
    assert "sum(-1).sqrt()" in fault.where


def test_watching_changes_no_number(watched: Any) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.3), nn.Linear(6, 3))
        return model, torch.optim.Adam(model.parameters(), lr=0.01)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for step in range(4):
            optimizer.zero_grad()
            y = model(torch.randn(5, 4))
            hidden = torch.where(y > 9, y, F.dropout(torch.log(y * 0 + 1 - 2 * (step == 2)), 0.5).nan_to_num(0, 0, 0))
            hidden.square().mean().backward()
            optimizer.step()

    plain, seen = build(), build()
    torch.manual_seed(1)
    train(*plain)
    torch.manual_seed(1)
    with watched(*seen):
        train(*seen)
    assert all(map(torch.equal, plain[0].parameters(), seen[0].parameters()))
