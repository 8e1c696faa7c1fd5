"""`safeloop.audit` around a loop that is not ours."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import safeloop as sl
from safeloop.audit.context import FaultWarning


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def loop(model: nn.Module, optimizer: torch.optim.Optimizer, poison: int | None = None, audit: Any = None) -> None:
    for step in range(5):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = model(x).square().mean() * (float("nan") if step == poison else 1.0)
        loss.backward()
        optimizer.step()
        if audit is not None:
            audit.step()


def test_a_sound_loop_has_no_fault_and_the_same_bits() -> None:
    model, optimizer = make()
    plain = copy.deepcopy(model)
    loop(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    with sl.audit(model=model, optimizers=optimizer, level="full") as audit:
        loop(model, optimizer, audit=audit)
    assert audit.faults == ()
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


def test_a_nan_is_found_before_the_step_and_warned_of_once() -> None:
    model, optimizer = make()
    with (
        pytest.warns(FaultWarning, match="SL501"),
        pytest.warns(FaultWarning, match="SL405"),
        sl.audit(model=model, optimizers=optimizer) as audit,
    ):
        loop(model, optimizer, poison=2, audit=audit)
    assert sorted(fault.code for fault in audit.faults) == ["SL405", "SL501"]
    assert "step 2" in next(fault.where for fault in audit.faults if fault.code == "SL501")
    assert "born in `mul` in the forward" in next(fault.where for fault in audit.faults if fault.code == "SL405")


def test_raise_stops_before_the_weights_are_changed() -> None:
    model, optimizer = make()
    with pytest.raises(sl.FaultError), sl.audit(model=model, optimizers=optimizer, on_fault="raise") as audit:
        loop(model, optimizer, poison=1, audit=audit)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_hooks_are_gone_after_an_exception() -> None:
    model, optimizer = make()
    with pytest.raises(KeyError), sl.audit(model=model, optimizers=optimizer):
        assert optimizer._optimizer_step_pre_hooks
        raise KeyError
    assert not optimizer._optimizer_step_pre_hooks


def test_an_optimizer_over_a_stale_copy_is_named_after_its_first_step() -> None:
    model, _ = make()
    optimizer = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        audit.step()
    assert {"SL201", "SL204"} <= {fault.code for fault in audit.faults}


def test_accepted_faults_and_level_off_say_nothing() -> None:
    model, _ = make()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with sl.audit(model=model, optimizers=optimizer, accept={"SL201": ["0.*"]}) as audit:
            loop(model, optimizer, audit=audit)
        assert audit.faults == ()
        with sl.audit(model=model, optimizers=optimizer, level="off") as audit:
            loop(model, optimizer, poison=1, audit=audit)
        assert audit.faults == ()


def test_a_model_alone_can_be_watched() -> None:
    model, _ = make()
    with sl.audit(model=model, on_fault="collect") as audit:
        pass
    assert audit.faults == ()


def test_a_parameter_written_between_forward_and_backward_is_named() -> None:
    model, optimizer = make()
    with pytest.raises(RuntimeError), sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        loss = model(torch.randn(4, 3)).square().mean()
        with torch.no_grad():
            model[2].weight.mul_(0.5)
        loss.backward()
    (fault,) = audit.faults
    assert (fault.code, fault.names) == ("SL303", ("2.weight",))
    assert "mul_" in fault.where
    assert "torch does not say" not in fault.why
    assert "after the backward pass" in fault.fix


class Recurrent(nn.Module):
    """An LSTM with a head, given its state and returning it."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, state: Any) -> Any:
        h, state = self.lstm(x, state)
        return self.head(h), state


def test_the_line_that_reads_a_state_of_an_earlier_iteration_is_told() -> None:
    model = Recurrent()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hidden = None
    with pytest.raises(RuntimeError), sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(3):
            out, hidden = model(torch.randn(5, 2, 3), hidden)
            optimizer.zero_grad()
            out.square().mean().backward()
            optimizer.step()
            audit.step()
    fault = next(fault for fault in audit.faults if fault.code == "SL310")
    assert "self.lstm(x, state)" in fault.where


def test_a_value_computed_once_before_the_loop_is_named() -> None:
    model, optimizer = make()
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        features = model[0](torch.randn(4, 3))
        for _ in range(4):
            optimizer.zero_grad()
            model[2](features.relu()).square().mean().backward(retain_graph=True)
            optimizer.step()
            audit.step()
    fault = next(fault for fault in audit.faults if fault.code == "SL310")
    assert "`features`" in fault.what
    assert "features = features.detach()" in fault.fix
