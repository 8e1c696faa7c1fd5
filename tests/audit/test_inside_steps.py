"""Inside a step of PyTorch's own nothing is heard, and what it wrote is known; the user's code in a step is heard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Optimizer

import safeloop as sl


class OwnStep(SGD):
    """Overrides the step, as a class of the user's may."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.addcmul_(p.grad, p.grad, value=-group["lr"])
        return None


def heard_in(make: Callable[[nn.Module], Optimizer], hook: Callable[..., None] | None = None) -> Counter[str]:
    """Names of what the tape hears in three iterations, by the witness that sees every call."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = make(model)
    seen: Counter[str] = Counter()
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        assert audit._watch is not None
        audit._watch.tape.witness = lambda func, call: seen.update([call.name])
        if hook is not None:
            optimizer.register_step_post_hook(hook)
        for _ in range(3):
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 2)).backward()
            optimizer.step()
            audit.step()
        assert not audit._watch.broken
    return seen


def test_a_step_of_pytorch_is_not_heard() -> None:
    seen = heard_in(lambda model: torch.optim.Adam(model.parameters(), foreach=False, fused=False))
    assert seen["linear"] == seen["backward"] == 3
    assert not {"lerp_", "addcdiv_", "addcmul_"} & seen.keys()


def test_a_step_of_the_users_is_heard() -> None:
    assert heard_in(lambda model: OwnStep(model.parameters(), lr=0.01))["addcmul_"] == 6


def test_a_hook_of_the_users_after_a_step_is_heard() -> None:
    def average(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            kept.lerp_(optimizer.param_groups[0]["params"][0], 0.1)

    kept = torch.zeros(2, 4)
    assert heard_in(lambda model: SGD(model.parameters(), lr=0.01), average)["lerp_"] == 3


def test_an_error_inside_a_step_leaves_the_tape_listening() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = SGD(model.parameters(), lr=0.01)
    seen: Counter[str] = Counter()
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        assert audit._watch is not None
        audit._watch.tape.witness = lambda func, call: seen.update([call.name])
        for step in range(4):
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(8, 4)), torch.randn(8, 2)).backward()
            group = optimizer.param_groups[0]
            nesterov = group.pop("nesterov")
            if step != 1:
                group["nesterov"] = nesterov
            with pytest.raises(KeyError) if step == 1 else nullcontext():
                optimizer.step()
            group["nesterov"] = nesterov
            audit.step()
    assert seen["linear"] == 4


@pytest.mark.parametrize("kind", [SGD, torch.optim.AdamW])
def test_what_a_step_wrote_is_known_by_its_line(kind: Callable[..., Optimizer]) -> None:
    """A second backward through the graph of the first, after the weights were changed by the step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = kind(model.parameters(), lr=0.01)
    with pytest.raises(RuntimeError), sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        out = model(torch.randn(8, 4))
        out.square().mean().backward(retain_graph=True)
        optimizer.step()
        optimizer.zero_grad()
        out.mean().backward()
    text = "\n".join(map(str, audit.faults))
    assert "optimizer.step()" in text
    assert "test_inside_steps.py" in text
