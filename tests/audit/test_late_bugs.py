"""Bugs that begin long after the first steps, where no iteration is looked at in depth: hooks alone still see them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

import safeloop as sl
from safeloop.audit import updates as watched_updates
from safeloop.audit.budget import FIRST_STEPS
from safeloop.audit.updates import GLANCE, LONG_GLANCE, MOST

BEGINS, STEPS = 60, 90


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def loss_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(torch.randn(8, 4)), torch.randint(0, 3, (8,)))


def codes(happens: Callable[[int, nn.Module, SGD, dict[str, Any]], None], **options: Any) -> list[str]:
    """The codes of a loop in which something happens at the start of each iteration."""
    model, kept = net(), {}
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    audit = sl.audit(model=model, optimizers=optimizer, budget=0.0, on_fault="collect", **options)
    with audit:
        for step in range(STEPS):
            happens(step, model, optimizer, kept)
            if "scaler" not in kept:
                for p in filter(lambda p: p.requires_grad, model.parameters()):
                    p.grad = None
                loss_of(model).backward()
                optimizer.step()
            audit.step()
        assert audit._watch is not None
        assert audit._watch.journal.state.updates == {"main": STEPS - kept.get("skipped", 0)}
    return [fault.code for fault in audit.faults]


def test_without_a_bug_nothing_is_said() -> None:
    assert codes(lambda *_: None) == []


def test_a_rate_that_falls_to_zero() -> None:
    def happens(step: int, model: nn.Module, optimizer: SGD, kept: dict[str, Any]) -> None:
        if step == BEGINS:
            optimizer.param_groups[0]["lr"] = 0.0

    assert codes(happens) == ["SL647"]


def test_frozen_parameters_that_keep_their_gradient() -> None:
    def happens(step: int, model: nn.Module, optimizer: SGD, kept: dict[str, Any]) -> None:
        if step == BEGINS:
            model[0].requires_grad_(False)  # type: ignore[index]

    assert codes(happens) == ["SL651"]


def test_a_schedule_of_an_optimizer_that_was_replaced() -> None:
    def happens(step: int, model: nn.Module, optimizer: SGD, kept: dict[str, Any]) -> None:
        if step == 0:
            kept["old"] = StepLR(SGD(model.parameters(), lr=0.1), 1)
        if step >= BEGINS and step % 10 == 0:
            kept["old"].step()

    with pytest.warns(UserWarning, match="lr_scheduler.step"):
        found = codes(happens)
    assert found == ["SL646"]


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.main, self.late = nn.Linear(4, 6), nn.Linear(6, 1), nn.Linear(6, 1)


def late_losses(model: TwoHeads, step: int, begins: int) -> dict[str, Tensor]:
    """From some step on a second head, compared with targets of another shape."""
    features = model.body(torch.randn(8, 4))
    terms = {"main": F.mse_loss(model.main(features), torch.randn(8, 1))}
    if step >= begins:
        terms["late"] = (model.late(features) - torch.randn(8)).square().mean()
    return terms


@pytest.mark.parametrize("begins", [BEGINS, STEPS])
def test_a_loop_whose_structure_changes_is_looked_at_again(begins: int) -> None:
    torch.manual_seed(0)
    model = TwoHeads()
    optimizer = SGD(model.parameters(), lr=0.05)
    deep = []
    with sl.audit(model=model, optimizers=optimizer, budget=0.0, on_fault="collect") as audit:
        for step in range(STEPS):
            optimizer.zero_grad()
            sum(late_losses(model, step, begins).values()).backward()  # type: ignore[union-attr]
            optimizer.step()
            assert audit._watch is not None
            deep += [step] if audit._watch.is_deep else []
            audit.step()
    assert [step for step in deep if step >= FIRST_STEPS] == ([begins + 1] if begins < STEPS else [])
    late = [fault for fault in audit.faults if fault.code == "SL420"]
    assert len(late) == (begins < STEPS)


@pytest.mark.parametrize("begins", [BEGINS, STEPS])
def test_a_run_whose_structure_changes_is_looked_at_again(begins: int) -> None:
    class Run(sl.Trainer):
        def losses(self, batch: Any) -> Any:
            return late_losses(self.model, self.step, begins)  # type: ignore[arg-type]

    torch.manual_seed(0)
    run = Run(
        model=TwoHeads(),
        data=[torch.zeros(1)],
        optimizers={"type": "SGD", "lr": 0.05},
        run={"max_steps": STEPS},
        audit={"budget": 0.0, "accept": {"SL502": ["late.*"]}},
        log={"sinks": []},
    )
    result = run.fit()
    late = [fault for fault in result.faults if fault.code == "SL420"]
    assert len(late) == (begins < STEPS)


def test_a_scaler_that_skips_everything() -> None:
    def happens(step: int, model: nn.Module, optimizer: SGD, kept: dict[str, Any]) -> None:
        if step < BEGINS:
            return
        scaler = kept.setdefault("scaler", torch.amp.GradScaler("cpu", init_scale=2.0))
        if step == BEGINS:
            kept["skipped"] = STEPS - BEGINS
        optimizer.zero_grad()
        scaler.scale(loss_of(model) * float("nan")).backward()
        scaler.step(optimizer)
        scaler.update()

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)

    def with_known(step: int, model: nn.Module, optimizer: SGD, kept: dict[str, Any]) -> None:
        if step >= BEGINS:
            kept.setdefault("scaler", scaler)
        happens(step, model, optimizer, kept)

    assert codes(with_known, scaler=scaler) == ["SL643"]


def test_what_is_remembered_of_a_loop_that_always_changes_has_an_end() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(8)))
    optimizer = SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, budget=0.0, on_fault="collect") as audit:
        assert audit._watch is not None
        updates = audit._watch._updates
        for step in range(2 * MOST):
            for bit, layer in enumerate(model):
                layer.weight.grad = torch.zeros(2, 2) if step >> bit & 1 else None
            updates.is_news("main", optimizer)
        assert len(updates._times) == MOST + 1


def test_two_structures_in_turn_are_told_no_more_often_than_one() -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, budget=0.0, on_fault="collect") as audit:
        assert audit._watch is not None
        updates = audit._watch._updates
        told = []
        for step in range(4 * MOST):
            for p in model[0].parameters():
                p.grad = torch.zeros_like(p) if step % 2 else None
            told.append(updates.is_news("main", optimizer))
        assert all(told[:MOST])
        assert sum(told[MOST:]) <= 0.15 * len(told)


def test_an_iteration_that_nothing_is_due_in_is_only_counted() -> None:
    """Of sixteen iterations fifteen do no more than count; a change of structure ends the quiet at once."""
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, budget=0.0, on_fault="collect") as audit:
        watch = audit._watch
        assert watch is not None
        over = []
        watch.iterate = lambda: over.append(audit._step)  # type: ignore[method-assign]
        for step in range(6 * GLANCE):
            optimizer.zero_grad()
            loss_of(model).backward()
            if step == 4 * GLANCE + 3:
                model[0].bias.grad = None
            optimizer.step()
            audit.step()
    later = [step for step in over if step >= 2 * GLANCE]
    changed = 4 * GLANCE + 3
    assert later == [3 * GLANCE - 1, 4 * GLANCE - 1, changed, changed + 1, 5 * GLANCE - 1, 6 * GLANCE - 1]


def test_in_a_long_run_glances_are_rarer(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first iterations one of 64 is more than counted, at the end of iterations and at updates alike."""
    monkeypatch.setattr(watched_updates, "LONG", 2 * GLANCE)
    model = net()
    optimizer = SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, budget=0.0, on_fault="collect") as audit:
        watch = audit._watch
        assert watch is not None
        over, compared = [], []
        iterate, is_news = watch.iterate, watch._updates._is_news
        watch.iterate = lambda: (over.append(audit._step), iterate())[1]  # type: ignore[method-assign]
        watch._updates._is_news = lambda *args: (compared.append(audit._step), is_news(*args))[1]  # type: ignore[method-assign]
        for _ in range(4 * LONG_GLANCE):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            audit.step()
    ends = [GLANCE * 2 - 1, *(LONG_GLANCE * n - 1 for n in range(1, 5))]
    assert [step for step in over if step >= 20] == ends
    gaps = [b - a for a, b in pairwise(step for step in compared if step >= 40)]
    assert len(gaps) >= 3
    assert set(gaps) == {LONG_GLANCE}


@pytest.mark.parametrize(("rests", "found"), [(8, []), (STEPS, ["SL647"])], ids=["comes back", "stays"])
def test_a_cosine_that_rests_at_zero(rests: int, found: list[str]) -> None:
    """The rate of a cosine is zero for one epoch of eight steps; then another schedule takes over, or none does."""

    def happens(step: int, model: nn.Module, optimizer: SGD, kept: dict[str, Any]) -> None:
        cosine = kept.setdefault("cosine", CosineAnnealingLR(optimizer, 3))
        if step and step % 8 == 0 and step <= 24:
            cosine.step()
        if step == 24 + rests:
            optimizer.param_groups[0]["lr"] = 0.03

    assert codes(happens) == found


@pytest.mark.parametrize("is_restored", [True, False])
def test_grad_mode_that_is_left_off_between_two_glances(is_restored: bool) -> None:
    model, kept = net(), 0
    optimizer = SGD(model.parameters(), lr=0.05)
    with sl.audit(model=model, optimizers=optimizer, budget=0.0, on_fault="collect") as audit:
        for step in range(STEPS):
            loss = loss_of(model)
            if loss.requires_grad:
                kept += 1
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if step == BEGINS + 1 and not is_restored:
                torch.set_grad_enabled(False)
            if step == BEGINS + 4:
                torch.set_grad_enabled(True)
            audit.step()
    assert kept == STEPS - (0 if is_restored else 3)
    assert [fault.code for fault in audit.faults] == ([] if is_restored else ["SL707"])


@pytest.mark.parametrize(("picks_first", "found"), [(True, ["SL503"]), (False, [])])
def test_a_router_whose_softmax_runs_over_the_best_one_alone(picks_first: bool, found: list[str]) -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.experts = nn.Linear(4, 3), nn.Linear(4, 9)

        def forward(self, x: Tensor) -> Tensor:
            scores = self.router(x)
            best, place = (scores if picks_first else scores.softmax(-1)).topk(1, -1)
            gate = best.softmax(-1) if picks_first else best
            choices = self.experts(x).view(-1, 3, 3)
            return gate * choices.gather(1, place[..., None].expand(-1, 1, 3)).squeeze(1)

    torch.manual_seed(0)
    model = Routed()
    optimizer = SGD(model.parameters(), lr=0.05)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(FIRST_STEPS):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            audit.step()
    assert [fault.code for fault in audit.faults] == found
