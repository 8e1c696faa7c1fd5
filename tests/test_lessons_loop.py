"""The lessons that are about the loop: owners, zeroed gradients and evaluation, rows 10, 11 and 24."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import safeloop as sl

# ------------------------------------------------------------------------------------------------------------ row 10


def test_row_10_zero_grad_of_a_part_leaves_the_rest_to_add_up() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=1e-9)
    seen = []
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(1, 1)).sum().backward()
            optimizer.step()
            seen.append((model[0].bias.grad.item() / model[1].weight.item(), model[1].bias.grad.item()))
    assert [pytest.approx(pair) for pair in [(1.0, 1.0), (2.0, 1.0), (3.0, 1.0)]] == seen
    assert [fault.code for fault in audit.faults] == ["SL201"]
    assert audit.faults[0].names == ("0.weight", "0.bias")


def test_row_10_zero_grad_of_the_model_misses_what_only_the_optimizer_holds() -> None:
    model, scale = nn.Linear(1, 1), nn.Parameter(torch.tensor(1.0))
    optimizer = torch.optim.SGD([*model.parameters(), scale], lr=1e-9)
    out = model(torch.ones(1, 1)).item()
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for step in range(1, 5):
            model.zero_grad()
            (scale * model(torch.ones(1, 1)).sum()).backward()
            assert scale.grad is not None
            assert scale.grad.item() == pytest.approx(step * out)
            optimizer.step()
            audit.step()
    assert [fault.code for fault in audit.faults] == ["SL630"]
    assert audit.faults[0].names == ("main[0][2]",)


def test_row_10_the_plan_prints_owned_and_frozen_and_a_second_owner_is_named() -> None:
    class Run(sl.Trainer):
        def loss(self, batch: Any) -> Tensor:
            return self.model(torch.ones(1, 1)).sum()

    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    rest: dict[str, Any] = {"data": [0], "run": {"max_steps": 1}, "log": {"sinks": []}}
    sgd = {"type": "SGD", "lr": 0.1, "params": ["1.*"]}
    plan = str(Run(model=model, optimizers=sgd, frozen=["0.*"], **rest).plan())
    assert "main: 2 tensors, 2 values" in plan
    assert "frozen: 0.weight, 0.bias" in plan
    both = {
        "one": torch.optim.SGD(model.parameters(), lr=0.1),
        "two": torch.optim.SGD([model[1].weight], lr=0.1),
    }
    with pytest.raises(sl.FaultError) as caught:
        Run(model=model, optimizers=both, **rest).fit()
    assert caught.value.fault.code == "SL202"
    assert caught.value.fault.names == ("1.weight",)


# ------------------------------------------------------------------------------------------------------------ row 11


def test_row_11_plain_torch_adds_up_and_a_forgotten_zero_grad_is_named_with_its_step() -> None:
    model = nn.ParameterDict({"w": torch.tensor(1.0)})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    seen = []
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(4):
            (5 * model["w"]).backward()
            seen.append(model["w"].grad.item())
            optimizer.step()
            audit.step()
    assert seen == [5, 10, 15, 20]
    assert [fault.code for fault in audit.faults] == ["SL630"]
    assert audit.faults[0].names == ("w",)
    assert "optimizer.step()" in audit.faults[0].where


def test_row_11_a_zero_grad_between_backward_and_step_is_named() -> None:
    model = nn.ParameterDict({"w": torch.tensor(1.0)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(4):
            (5 * model["w"]).backward()
            optimizer.zero_grad()
            optimizer.step()
            audit.step()
    assert model["w"].item() == 1.0
    assert {"SL631", "SL632"}.intersection(fault.code for fault in audit.faults)
    assert all("optimizer.zero_grad()" in fault.where + fault.what for fault in audit.faults)


# ------------------------------------------------------------------------------------------------------------ row 24


def normalised() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))


def validation() -> Tensor:
    return torch.randn(16, 3, generator=torch.Generator().manual_seed(1)) + 5


def loop_with_validation(*, no_grad: bool, is_kept: bool = False) -> list[str]:
    model, kept = normalised(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = model[1].running_mean.clone()
    model(validation())
    assert not torch.equal(model[1].running_mean, before), "plain torch: statistics took in validation data"
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect", level="full") as audit:
        for _ in range(8):
            optimizer.zero_grad()
            model(torch.randn(16, 3)).square().mean().backward()
            optimizer.step()
            with torch.set_grad_enabled(not no_grad):
                error = model(validation()).square().mean()
            assert error.requires_grad is not no_grad
            if is_kept:
                kept.append(error)
            audit.step()
    return [fault.code for fault in audit.faults]


def test_row_24_validation_data_in_running_statistics_is_found() -> None:
    assert loop_with_validation(no_grad=True) == ["SL702"]


def test_row_24_graphs_of_validation_losses_that_are_kept_are_found() -> None:
    assert "SL311" in loop_with_validation(no_grad=False, is_kept=True)


def test_row_24_an_evaluation_of_the_trainer_changes_no_bit() -> None:
    modes = []

    class Run(sl.Trainer):
        def loss(self, batch: Tensor) -> Tensor:
            return self.model(batch).square().mean()

        def metrics(self, batch: Tensor) -> dict[str, Tensor]:
            torch.rand(3)
            error = self.model(batch).square()
            modes.append((self.model.training, torch.is_grad_enabled(), error.requires_grad))
            return {"error": error}

    def trained(**more: Any) -> tuple[nn.Module, Tensor]:
        model = normalised()
        rest: dict[str, Any] = {"optimizers": {"type": "SGD", "lr": 0.1}, "log": {"sinks": []}, **more}
        Run(model=model, data=[torch.ones(4, 3), torch.zeros(4, 3)], run={"max_steps": 6}, **rest).fit()
        return model, torch.get_rng_state()

    (alone, rng), (watched, rng_after) = trained(), trained(eval_data=[validation()], evaluate={"every": 1})
    assert modes == [(False, False, False)] * len(modes)
    assert len(modes) >= 6
    assert torch.equal(rng, rng_after)
    assert watched.training
    assert all(map(torch.equal, alone.state_dict().values(), watched.state_dict().values()))
    for ours, theirs in zip(alone.parameters(), watched.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
