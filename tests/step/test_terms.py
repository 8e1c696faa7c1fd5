"""Loss terms that are not there on every step, whose weight moves, or that are computed only when due."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import safeloop as sl

OFF: dict[str, Any] = {"sinks": []}
TINY = {"type": "SGD", "lr": 1e-12}


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.0))


def gradients(losses: dict[str, Any], terms: Any, steps: int) -> list[float]:
    """The gradient of `w` after each step."""
    seen: list[float] = []

    class Run(sl.Trainer):
        def losses(self, batch: Tensor) -> Any:
            return terms(self.model)

    model = Scalar()
    model.w.register_hook(lambda gradient: seen.append(gradient.item()))
    Run(model=model, data=[torch.ones(1)], optimizers=TINY, losses=losses, run={"max_steps": steps}, log=OFF).fit()
    return seen


def test_a_weight_follows_its_line_and_stays_at_its_end() -> None:
    ramp = {"start": 0.0, "end": 1.0, "steps": 4, "begin": 1}
    found = gradients({"a": {"weight": ramp}}, lambda m: {"a": 8 * m.w, "b": m.w * 1.0}, 8)
    assert found == [1.0, 1.0, 3.0, 5.0, 7.0, 9.0, 9.0, 9.0]


def test_a_term_counts_only_on_its_steps() -> None:
    found = gradients({"rare": {"every": 3}}, lambda m: {"rare": 10 * m.w, "base": m.w * 1.0}, 7)
    assert found == [11.0, 1.0, 1.0, 11.0, 1.0, 1.0, 11.0]


def test_a_callable_term_is_computed_only_when_due() -> None:
    calls: list[int] = []

    def terms(model: Scalar) -> dict[str, Any]:
        def costly() -> Tensor:
            calls.append(1)
            return 10 * model.w

        return {"rare": costly, "base": model.w * 1.0}

    assert gradients({"rare": {"every": 2}}, terms, 4) == [11.0, 1.0, 11.0, 1.0]
    assert len(calls) == 2


def test_a_callable_that_gives_no_tensor_is_a_fault_like_any_other() -> None:
    with pytest.raises(sl.FaultError, match="SL402"):
        gradients({}, lambda m: {"late": lambda: 0.0, "base": m.w * 1.0}, 1)


def test_the_logged_total_has_the_weights_of_its_step(tmp_path: Path) -> None:
    class Run(sl.Trainer):
        def losses(self, batch: Tensor) -> dict[str, Tensor]:
            return {"a": 8 * self.model.w, "b": self.model.w * 1.0}

    ramp = {"start": 0.0, "end": 1.0, "steps": 2}
    run = {"max_steps": 3, "dir": str(tmp_path)}
    log = {"every": 1, "sinks": ["jsonl"]}
    result = Run(
        model=Scalar(), data=[torch.ones(1)], optimizers=TINY, losses={"a": {"weight": ramp}}, run=run, log=log
    ).fit()
    assert result.dir is not None
    lines = [json.loads(line) for line in (result.dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss/train"] for line in lines if line.get("kind") == "train"] == [1.0, 5.0, 9.0]


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 1), nn.Linear(5, 1)


class Both(sl.Trainer):
    def losses(self, batch: Tensor) -> dict[str, Tensor]:
        hidden = self.model.trunk(batch).tanh()
        a, b = self.model.a(hidden).float(), self.model.b(hidden).float()
        return {"a": a.square().mean(), "b": (b - 1).square().mean()}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_norms_and_cosine_at_the_cut_are_logged_and_change_no_bit(tmp_path: Path, precision: str) -> None:
    torch.manual_seed(0)
    data = [torch.randn(6, 3)]

    def train(log: dict[str, Any]) -> tuple[nn.Module, sl.RunResult]:
        torch.manual_seed(1)
        model = TwoHeads()
        run = {"max_steps": 3, "dir": str(tmp_path), "precision": precision}
        sgd = {"type": "SGD", "lr": 0.1}
        return model, Both(
            model=model, data=data, optimizers=sgd, losses={"b": {"weight": 0.5}}, run=run, log=log
        ).fit()

    watched, result = train({"every": 1, "sinks": ["jsonl"]})
    quiet, _ = train(OFF)
    assert all(torch.equal(x, y) for x, y in zip(watched.parameters(), quiet.parameters(), strict=True))
    assert result.dir is not None
    line = json.loads((result.dir / "metrics.jsonl").read_text().splitlines()[0])
    torch.manual_seed(1)
    model = TwoHeads()
    hidden = model.trunk(data[0]).tanh().detach().requires_grad_()
    left = torch.autograd.grad(model.a(hidden).square().mean(), hidden)[0].flatten()
    right = torch.autograd.grad(0.5 * (model.b(hidden) - 1).square().mean(), hidden)[0].flatten()
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    assert line["loss_grad/a"] == pytest.approx(left.norm().item(), rel=tolerance)
    assert line["loss_grad/b"] == pytest.approx(right.norm().item(), rel=tolerance)
    cosine = torch.cosine_similarity(left, right, dim=0).item()
    assert line["loss_cos/a~b"] == pytest.approx(cosine, rel=tolerance, abs=1e-3)
