"""After the first steps the audit at `standard` leaves nothing on a step that it does not look at."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _autograd
from torch.nn.modules import module as modules
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

import safeloop as sl
from safeloop.audit.budget import FIRST_STEPS
from safeloop.checks.update.order import SkippedTooOften

SYNCS = {torch.ops.aten._local_scalar_dense, torch.ops.aten.item}


def left_behind(model: nn.Module) -> dict[str, int]:
    """What of a watch is there now."""
    hooked = (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    return {
        "function modes": len(_get_current_function_mode_stack()),
        "dispatch modes": len(_get_current_dispatch_mode_stack()),
        "global module hooks": len(modules._global_forward_pre_hooks) + len(modules._global_forward_hooks),
        "module hooks": sum(map(bool, hooked)),
        "saved-tensor hooks": int(_autograd._top_saved_tensors_default_hooks(True) is not None),
    }


class Syncs(TorchDispatchMode):
    """Counts what would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in SYNCS
        return func(*args, **(kwargs or {}))


class Spy(sl.Trainer):
    """Looks around from inside the loss function."""

    def loss(self, batch: Any) -> Tensor:
        self.seen.append(left_behind(self.model))
        return F.mse_loss(self.model(batch), batch)

    @property
    def seen(self) -> list[dict[str, int]]:
        return self.__dict__.setdefault("_seen", [])


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))


def run(level: str, steps: int = FIRST_STEPS + 10, kind: type[Spy] = Spy) -> Spy:
    torch.manual_seed(1)
    data = [torch.randn(8, 4) for _ in range(4)]
    sgd = {"type": "SGD", "lr": 0.01}
    trainer = kind(
        model=net(),
        data=data,
        optimizers=sgd,
        run={"max_steps": steps},
        audit={"level": level, "budget": 0.0},
        log={"sinks": []},
    )
    trainer.fit()
    return trainer


def test_in_a_trainer_a_later_step_runs_as_without_an_audit() -> None:
    seen = run("standard").seen
    assert any(seen[0].values()), "the first steps are looked at"
    assert seen[FIRST_STEPS:] == run("off").seen[FIRST_STEPS:]
    assert not any(any(one.values()) for one in seen[FIRST_STEPS:])


class Told(Spy):
    """Something new is told on a step that is not looked at."""

    def loss(self, batch: Any) -> Tensor:
        if self.step == FIRST_STEPS + 5:
            fault = replace(SkippedTooOften.fault("something new", where="here"), severity="warning")
            self._assembly.audit.faults([fault], self.step)
        return super().loss(batch)


def test_the_step_after_a_new_fault_is_looked_at() -> None:
    trainer = run("standard", kind=Told)
    looked_at = [step for step, left in enumerate(trainer.seen) if any(left.values())]
    assert looked_at == [*range(FIRST_STEPS), FIRST_STEPS + 6]


def plain_loop(level: str | None, steps: int) -> tuple[nn.Module, list[dict[str, int]], list[int]]:
    """A loop of one's own: its model, what was there in each iteration, and how often it waited."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    audit = sl.audit(model=model, optimizers=optimizer, level=level or "off", budget=0.0, on_fault="collect")
    seen, waits = [], []
    torch.manual_seed(1)
    with audit:
        for _ in range(steps):
            with Syncs() as syncs:
                optimizer.zero_grad()
                x = torch.randn(8, 4)
                F.mse_loss(model(x), x).backward()
                optimizer.step()
            seen.append(left_behind(model))
            waits.append(syncs.count)
            audit.step()
    assert audit.faults == ()
    return model, seen, waits


def test_around_a_loop_a_later_iteration_runs_as_without_an_audit() -> None:
    model, seen, waits = plain_loop("standard", FIRST_STEPS + 10)
    assert any(seen[0].values()), "the first iterations are looked at"
    assert not any(any(one.values()) for one in seen[FIRST_STEPS:])
    assert set(waits[FIRST_STEPS:]) == {0}
    bare, _, _ = plain_loop(None, FIRST_STEPS + 10)
    assert all(map(torch.equal, model.parameters(), bare.parameters()))


@pytest.mark.parametrize("leave", ["end", "error", "break"])
def test_nothing_is_left_after_the_watch(leave: str) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    try:
        with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
            for _ in range(3):
                F.mse_loss(model(torch.ones(2, 4)), torch.zeros(2, 4)).backward()
                if leave == "error":
                    raise KeyError("the user's own")
                if leave == "break":
                    break
                optimizer.step()
                optimizer.zero_grad()
                audit.step()
    except KeyError:
        assert leave == "error"
    assert not any(left_behind(model).values())
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
