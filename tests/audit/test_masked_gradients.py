"""Gradients that the program masks while the optimizer moves the weights, beside masks that hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import safeloop as sl

Loop = Callable[[Any], None]
MOVING: list[Loop] = []
STILL: list[Loop] = []


def moving(loop: Loop) -> Loop:
    """Add a loop whose masked entries move."""
    MOVING.append(loop)
    return loop


def still(loop: Loop) -> Loop:
    """Add one that is correct."""
    STILL.append(loop)
    return loop


def found_in(loop: Loop, watched: Any) -> list[Any]:
    audits: list[Any] = []

    def watch(*args: Any) -> Any:
        inner = watched(*args)

        class Kept:
            def __enter__(self) -> Any:
                audits.append(inner.__enter__())
                return audits[0]

            def __exit__(self, *error: Any) -> Any:
                return inner.__exit__(*error)

        return Kept()

    torch.manual_seed(0)
    loop(watch)
    return [fault for fault in audits[0].faults if fault.code == "SL675"]


def table() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(12, 6), nn.Flatten(), nn.Linear(18, 3))


def loss_of(model: nn.Module, high: int = 12) -> Tensor:
    return F.cross_entropy(model(torch.randint(0, high, (8, 3))), torch.randint(0, 3, (8,)))


def run(watch: Any, model: nn.Module, optimizer: Any, edit: Any = None, after: Any = None, high: int = 12) -> None:
    with watch(model, optimizer) as audit:
        for _ in range(16):
            optimizer.zero_grad()
            loss_of(model, high).backward()
            if edit is not None:
                edit()
            optimizer.step()
            if after is not None:
                after()
            audit.step()


@pytest.mark.parametrize("loop", MOVING, ids=lambda loop: loop.__name__)
def test_masked_entries_that_move_are_named(loop: Loop, watched: Any) -> None:
    found = found_in(loop, watched)
    assert [fault.names for fault in found] == [("0.weight",)]


@pytest.mark.parametrize("loop", STILL, ids=lambda loop: loop.__name__)
def test_masks_that_hold_are_not(loop: Loop, watched: Any) -> None:
    assert found_in(loop, watched) == []


@moving
def rows_are_zeroed_by_the_loop(watch: Any) -> None:
    model = table()

    def edit() -> None:
        model[0].weight.grad[:11] = 0

    run(watch, model, AdamW(model.parameters(), lr=0.01), edit)


@moving
def a_mask_of_entries_in_a_hook(watch: Any) -> None:
    model = nn.Sequential(nn.Embedding(12, 6), nn.Flatten(), nn.Linear(18, 3))
    keep = (torch.rand(12, 6) > 0.5).float()
    model[0].weight.register_hook(lambda g: g * keep)
    run(watch, model, SGD(model.parameters(), lr=0.1, weight_decay=1e-3))


@moving
def a_hook_after_the_gradient_is_there(watch: Any) -> None:
    model = table()

    def freeze(p: Tensor) -> None:
        assert p.grad is not None
        p.grad[torch.arange(6)] = 0.0

    model[0].weight.register_post_accumulate_grad_hook(freeze)
    run(watch, model, AdamW(model.parameters(), lr=0.01))


@moving
def momentum_from_before_the_mask(watch: Any) -> None:
    model = table()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.95)
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()

    def edit() -> None:
        model[0].weight.grad[:6].mul_(0)
        model[0].weight.grad.mul_(1.0)

    run(watch, model, optimizer, edit)


@still
def without_decay(watch: Any) -> None:
    model = table()

    def edit() -> None:
        model[0].weight.grad[:11] = 0

    run(watch, model, AdamW(model.parameters(), lr=0.01, weight_decay=0.0), edit)


@still
def rows_are_copied_back(watch: Any) -> None:
    model = table()
    old = model[0].weight.detach().clone()

    def edit() -> None:
        model[0].weight.grad[:11] = 0

    @torch.no_grad()
    def restore() -> None:
        model[0].weight[:11] = old[:11]

    run(watch, model, AdamW(model.parameters(), lr=0.01), edit, restore)


@still
def pruned_weights(watch: Any) -> None:
    model = table()
    keep = (torch.rand(12, 6) > 0.5).float()
    with torch.no_grad():
        model[0].weight.mul_(keep)
    model[0].weight.register_hook(lambda g: g * keep)
    run(watch, model, AdamW(model.parameters(), lr=0.01))


@still
def gradient_dropout(watch: Any) -> None:
    model = table()
    model[0].weight.register_hook(lambda g: g * (torch.rand_like(g) > 0.3))
    run(watch, model, AdamW(model.parameters(), lr=0.01))


@still
def rows_that_no_batch_has_used(watch: Any) -> None:
    model = table()
    model[0].weight.register_hook(lambda g: g.clamp(-1, 1))
    run(watch, model, AdamW(model.parameters(), lr=0.01), high=5)


@still
def gradients_scaled_by_hand(watch: Any) -> None:
    model = table()

    def edit() -> None:
        for p in model.parameters():
            p.grad.mul_(0.5)

    run(watch, model, AdamW(model.parameters(), lr=0.01), edit, high=5)


@still
def only_the_largest_gradients(watch: Any) -> None:
    model = table()
    model[2].weight.register_hook(lambda g: g * (g.abs() >= g.abs().flatten().kthvalue(40).values))
    run(watch, model, AdamW(model.parameters(), lr=0.01))


def test_the_hooks_of_the_program_are_as_before(watched: Any) -> None:
    model = table()
    order: list[str] = []
    first = model[0].weight.register_hook(lambda g: order.append("a"))
    model[0].weight.register_hook(lambda g: order.append("b"))
    optimizer = SGD(model.parameters(), lr=0.1)
    with watched(model, optimizer) as audit:
        for i in range(6):
            if i == 3:
                first.remove()
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            audit.step()
    assert order == ["a", "b"] * 3 + ["b"] * 3
    assert len(model[0].weight._backward_hooks or ()) == 1


def test_a_trainer_names_them_too() -> None:
    class Run(sl.Trainer):
        def loss(self, batch: Tensor) -> Tensor:
            return self.model(batch).square().mean()

    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))
    rows = torch.tensor([0, 3])

    def hook(gradient: Tensor) -> Tensor:
        return gradient.index_fill(0, rows, 0.0)

    model[0].weight.register_hook(hook)
    options: dict[str, Any] = {"run": {"max_steps": 12}, "log": {"sinks": []}}
    data = [torch.randn(8, 6) for _ in range(12)]
    trainer = Run(model=model, data=data, optimizers=AdamW(model.parameters(), lr=0.01), **options)
    trainer.fit()
    assert [fault.code for fault in trainer.faults] == ["SL675"]
    assert "hook" in trainer.faults[0].where
