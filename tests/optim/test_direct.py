"""The direct path: the bits of `optimizer.step()`, and a way back to it whenever something does not fit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from safeloop.optim.direct import direct_update

KINDS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    (torch.optim.Adam, {"lr": 1e-2, "amsgrad": True, "weight_decay": 0.1}),
    (torch.optim.Adam, {"lr": 1e-2, "maximize": True, "betas": (0.0, 0.5)}),
    (torch.optim.SGD, {"lr": 1e-1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (torch.optim.SGD, {"lr": 1e-1, "momentum": 0.9, "dampening": 0.3}),
    (torch.optim.SGD, {"lr": 1e-1}),
]


def parameters(n: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, generator=generator).requires_grad_() for _ in range(n)]


def gradients(step: int, n: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(3, 4, generator=generator) for _ in range(n)]


def set_gradients(tensors: list[Tensor], step: int) -> list[Tensor]:
    for tensor, gradient in zip(tensors, gradients(step), strict=True):
        tensor.grad = gradient
    return [tensor.grad for tensor in tensors if tensor.grad is not None]


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("grouped", [False, True])
def test_it_has_the_bits_of_step_and_its_state(kind: Any, options: dict[str, Any], grouped: bool) -> None:
    ours, theirs = parameters(), parameters()

    def make(tensors: list[Tensor]) -> torch.optim.Optimizer:
        groups = [{"params": tensors[:1], "lr": 0.5}, {"params": tensors[1:]}] if grouped else tensors
        return kind(groups, fused=True, **options)

    first, second = make(ours), make(theirs)
    direct = direct_update(first)
    assert direct is not None
    for step in range(8):
        direct(set_gradients(ours, step))
        set_gradients(theirs, step)
        second.step()
        if step == 4:
            first.param_groups[0]["lr"] = second.param_groups[0]["lr"] = 1e-3
    assert direct._size == 3, "the direct path must have been taken"
    assert all(map(torch.equal, ours, theirs))
    a, b = first.state_dict(), second.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for index, state in a["state"].items():
        for name, value in state.items():
            assert torch.equal(value, b["state"][index][name]), name


def test_a_missing_gradient_takes_step_and_the_parameter_stays() -> None:
    tensors = parameters()
    optimizer = torch.optim.AdamW(tensors, lr=0.1, fused=True)
    direct = direct_update(optimizer)
    assert direct is not None
    for step in range(2):
        direct(set_gradients(tensors, step))
    still = tensors[1].detach().clone()
    moved = tensors[0].detach().clone()
    given = set_gradients(tensors, 2)
    tensors[1].grad = None
    direct([given[0], given[2]])
    assert torch.equal(tensors[1], still), "neither momentum nor decay may move it"
    assert not torch.equal(tensors[0], moved)


def test_a_hook_registered_later_is_called() -> None:
    tensors = parameters()
    optimizer = torch.optim.SGD(tensors, lr=0.1, momentum=0.9, fused=True)
    direct = direct_update(optimizer)
    assert direct is not None
    direct(set_gradients(tensors, 0))
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    direct(set_gradients(tensors, 1))
    assert calls == [1]


def test_a_state_that_was_loaded_in_between_is_used() -> None:
    ours, theirs = parameters(), parameters()
    first, second = (torch.optim.Adam(tensors, lr=0.1, fused=True) for tensors in (ours, theirs))
    direct = direct_update(first)
    assert direct is not None
    for step in range(3):
        direct(set_gradients(ours, step))
        set_gradients(theirs, step)
        second.step()
    saved = copy.deepcopy(second.state_dict())
    for step in range(3, 5):
        direct(set_gradients(ours, step))
    first.load_state_dict(saved)
    with torch.no_grad():
        for tensor, other in zip(ours, theirs, strict=True):
            tensor.copy_(other)
    for step in range(5, 8):
        direct(set_gradients(ours, step))
        set_gradients(theirs, step)
        second.step()
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.AdamW(parameters(), lr=0.1, fused=False),
        torch.optim.Adam(parameters(), lr=0.1, foreach=True),
        torch.optim.RMSprop(parameters(), lr=0.1),
        torch.optim.Adam(parameters(), lr=torch.tensor(0.1), fused=True),
        type("Mine", (torch.optim.AdamW,), {})(parameters(), lr=0.1, fused=True),
    ],
    ids=["not fused", "foreach", "another class", "tensor lr", "a subclass"],
)
def test_what_is_not_exactly_known_has_no_direct_path(optimizer: torch.optim.Optimizer) -> None:
    assert direct_update(optimizer) is None


def test_a_stale_graph_is_still_refused_after_a_fused_update() -> None:
    """Fused kernels bump no version counter: torch alone would differentiate through new weights in silence."""
    import safeloop as sl

    class Stale(sl.Trainer):
        kept: Any = None

        def loss(self, batch: Tensor) -> Tensor:
            value = self.model(batch).square().mean()
            stale, self.kept = self.kept, self.model(self.model(batch)).square().mean()
            return value if stale is None else value + stale

    run = {"max_steps": 3}
    with pytest.raises(sl.FaultError) as caught:
        Stale(
            model=nn.Linear(3, 3),
            data=[torch.ones(2, 3)],
            optimizers={"type": "Adam", "lr": 0.1},
            run=run,
            log={"sinks": []},
        ).fit()
    assert {fault.code for fault in (caught.value.fault, *caught.value.others)} & {"SL302", "SL303"}
