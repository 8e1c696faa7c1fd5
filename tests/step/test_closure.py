"""LBFGS: the loop owns the closure."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import safeloop as sl

OFF: dict[str, Any] = {"sinks": []}
SPEC = {"type": "LBFGS", "lr": 1.0, "max_iter": 8, "line_search_fn": "strong_wolfe"}


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def rows(n: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, x.sin().sum(1, keepdim=True)


class Fit(sl.Trainer):
    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.mse_loss(self.model(x), y)


def train(net: nn.Module, data: list[Any], **sections: Any) -> sl.RunResult:
    sections = {"optimizers": SPEC, "run": {"max_steps": 5}, "log": OFF, **sections}
    return Fit(model=net, data=data, **sections).fit()


def test_it_has_the_bits_of_torch_with_a_right_closure() -> None:
    net = make_net()
    plain = copy.deepcopy(net)
    optimizer = torch.optim.LBFGS(plain.parameters(), lr=1.0, max_iter=8, line_search_fn="strong_wolfe")
    x, y = rows()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(plain(x), y)
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    result = train(net, [(x, y)])
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), plain.parameters(), strict=True))
    assert result.losses["loss"] < 0.05


def test_accumulation_inside_the_closure_equals_the_full_batch() -> None:
    x, y = rows()
    ours, plain = make_net(), make_net()
    sizes = [5, 11, 8]
    micro = list(zip(x.split(sizes), y.split(sizes), strict=True))
    train(ours, micro, accumulate={"micro_batches": 3}, run={"max_steps": 2})
    train(plain, [(x, y)], run={"max_steps": 2})
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-8)


def test_a_nan_in_the_middle_of_the_search_leaves_the_weights_of_before_the_step() -> None:
    class Breaks(Fit):
        calls = 0

        def loss(self, batch: Any) -> Tensor:
            self.calls += 1
            return super().loss(batch) * (float("nan") if self.calls == 3 else 1.0)

    net = make_net()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(sl.FaultError, match="SL405"):
        Breaks(model=net, data=[rows()], optimizers=SPEC, run={"max_steps": 1}, log=OFF).fit()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"optimizers": {**SPEC, "max_norm": 1.0}}, "clipped"),
        ({"run": {"max_steps": 1, "precision": "fp16"}}, "fp16"),
        (
            {"optimizers": {"a": {**SPEC, "params": ["0.*"]}, "b": {"type": "SGD", "lr": 0.1, "params": "rest"}}},
            "other optimizers",
        ),
    ],
)
def test_where_it_cannot_work_it_is_refused(sections: dict[str, Any], reason: str) -> None:
    with pytest.raises(sl.FaultError, match=reason) as caught:
        train(make_net(), [rows()], **sections)
    assert caught.value.fault.code == "SL610"


def test_a_repeating_phase_is_refused() -> None:
    class Repeats(sl.Trainer):
        @sl.phase(trains="main", repeat=2)
        def fit_it(self, batch: Any) -> dict[str, Tensor]:
            return {"mse": F.mse_loss(self.model(batch[0]), batch[1])}

    with pytest.raises(sl.FaultError, match="repeats"):
        Repeats(model=make_net(), data=[rows()], optimizers=SPEC, run={"max_steps": 1}, log=OFF).fit()


def test_dropout_is_warned_of() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    faults = train(net, [rows()], run={"max_steps": 1}).faults
    assert [(fault.code, fault.severity) for fault in faults] == [("SL611", "warning")]


def test_the_plan_shows_what_an_evaluation_does() -> None:
    trainer = Fit(model=make_net(), data=[rows()], optimizers=SPEC, run={"max_steps": 1}, log=OFF)
    assert "up to 10 evaluations, each: zero, forward, backward, finite" in str(trainer.plan())


def test_tokens_without_a_count_are_refused() -> None:
    weighting = {"micro_batches": 2, "weight_by": "tokens"}
    with pytest.raises(sl.FaultError, match="SL612"):
        train(make_net(), [rows()] * 2, accumulate=weighting)
