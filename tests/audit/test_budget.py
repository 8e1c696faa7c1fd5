"""When a step is looked at in depth: the first twenty, those asked for, and what a share of the time pays for."""

from __future__ import annotations

import pytest

from safeloop.audit.budget import FIRST_STEPS, STRIDE, Budget


def simulate(budget: Budget, steps: int, plain: float, deep: float) -> list[int]:
    """The steps that are looked at, where a step takes `plain` seconds, and `deep` when it is looked at."""
    chosen, due = [], 0
    for step in range(steps):
        if step < due:
            continue
        is_deep = budget.wants(step)
        chosen += [step] if is_deep else []
        budget.done(step, deep if is_deep else plain, was_deep=is_deep)
        due = budget.after(step)
    return chosen


def test_of_the_later_plain_steps_few_are_timed() -> None:
    budget, step, asked = Budget("standard", 0.0), 0, []
    while step < 200:
        asked.append(step)
        budget.done(step, 5e-3 if (is_deep := budget.wants(step)) else 1e-3, was_deep=is_deep)
        step = budget.after(step)
    assert asked == [*range(FIRST_STEPS), *range(FIRST_STEPS - 1 + STRIDE, 200, STRIDE)]
    budget.ask()
    assert budget.after(199) == 200


@pytest.mark.parametrize(("level", "expected"), [("off", 0), ("full", 400)])
def test_off_looks_at_nothing_and_full_at_everything(level: str, expected: int) -> None:
    assert len(simulate(Budget(level), 400, 1e-3, 5e-3)) == expected


def test_without_a_share_only_the_first_steps_are_looked_at() -> None:
    assert simulate(Budget("standard", 0.0), 5_000, 1e-3, 5e-3) == list(range(FIRST_STEPS))


@pytest.mark.parametrize("share", [0.01, 0.05])
@pytest.mark.parametrize("deep", [2e-3, 1e-2, 1e-1])
def test_after_the_first_steps_the_cost_stays_within_the_share(share: float, deep: float) -> None:
    plain, steps = 1e-3, 100_000
    later = [step for step in simulate(Budget("standard", share), steps, plain, deep) if step >= FIRST_STEPS]
    assert later, "a budget must buy something"
    assert len(later) * (deep - plain) <= share * steps * plain * 1.01


def test_a_step_that_is_asked_for_is_looked_at_once() -> None:
    budget = Budget("standard", 0.0)
    simulate(budget, 30, 1e-3, 5e-3)
    budget.ask()
    assert budget.wants(30)
    budget.done(30, 5e-3, was_deep=True)
    assert not budget.wants(31)


def test_no_budget_means_every_step() -> None:
    assert len(simulate(Budget("standard", None), 100, 1e-3, 5e-3)) == 100


def test_what_was_spent_is_told_once() -> None:
    budget = Budget("standard", 0.05)
    simulate(budget, 2_000, 1e-3, 5e-3)
    assert budget.take_spent_ms() > 0
    assert budget.take_spent_ms() == 0
