"""Data that ends where a step would need more: the step is not begun, or what was done of it is told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import safeloop as sl

OFF: dict[str, Any] = {"sinks": []}
SGD: dict[str, Any] = {"type": "SGD", "lr": 0.1}
OPTIMIZERS = {"left": {**SGD, "params": ["0.*"]}, "right": {**SGD, "params": ["1.*"]}}


class Two(sl.Trainer):
    """Three turns of `left` and one of `right`: four windows a step."""

    @sl.phase(trains="left", repeat=3)
    def first(self, batch: Tensor) -> dict[str, Tensor]:
        self.turns.append("left")
        return {"left": self.model[0](batch).square().mean()}

    @sl.phase(trains="right")
    def second(self, batch: Tensor) -> dict[str, Tensor]:
        self.turns.append("right")
        return {"right": self.model(batch).square().mean()}

    @property
    def turns(self) -> list[str]:
        return self.__dict__.setdefault("_turns", [])


class NoLength:
    """Batches that can be read again, and nobody knows how many."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[Tensor]:
        yield from batches(self.n)


def batches(n: int) -> list[Tensor]:
    return list(torch.randn(n, 2, 4, generator=torch.Generator().manual_seed(1)))


def two(data: Any, **sections: Any) -> tuple[Two, sl.RunResult]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    trainer = Two(model=model, data=data, optimizers=OPTIMIZERS, log=OFF, **sections)
    return trainer, trainer.fit()


@pytest.mark.parametrize(
    ("num", "epochs", "micro_batches", "steps"),
    [(10, 1, 1, 2), (10, 2, 1, 5), (12, 1, 1, 3), (3, 1, 1, 0), (9, 1, 2, 1), (5, 4, 2, 3), (16, 1, 2, 2)],
)
def test_a_step_that_the_data_cannot_complete_is_not_begun(
    num: int, epochs: int, micro_batches: int, steps: int
) -> None:
    """9 micro-batches are 5 windows of 2; 4 epochs of 5 are 12 windows of at most 2."""
    trainer, result = two(batches(num), run={"max_epochs": epochs}, accumulate={"micro_batches": micro_batches})
    assert result.steps == steps
    assert trainer.turns.count("left") == steps * 3 * micro_batches - short(num, epochs, micro_batches, steps)[0]
    assert result.faults == ()
    assert result.outcome == "finished"


def short(num: int, epochs: int, micro_batches: int, steps: int) -> tuple[int, int]:
    """How many micro-batches the short windows at the ends of epochs lack, of `left` and of `right`."""
    windows: list[int] = []
    for _ in range(epochs):
        windows += [min(micro_batches, num - start) for start in range(0, num, micro_batches)]
    used = windows[: steps * 4]
    lacking = [micro_batches - size for size in used]
    return sum(n for i, n in enumerate(lacking) if i % 4 < 3), sum(lacking[3::4])


def test_an_iterator_with_a_length_is_known_too() -> None:
    class Counted:
        def __init__(self) -> None:
            self.rest = iter(batches(7))

        def __len__(self) -> int:
            return 7

        def __iter__(self) -> Counted:
            return self

        def __next__(self) -> Tensor:
            return next(self.rest)

    trainer, result = two(Counted(), run={"max_steps": 9})
    assert (result.steps, len(trainer.turns)) == (1, 4)
    assert [fault.code for fault in result.faults] == ["SL854"]


def test_what_was_done_of_a_step_is_told_where_nobody_could_know() -> None:
    trainer, result = two(NoLength(6), run={"max_epochs": 1})
    assert result.steps == 1
    assert trainer.turns == ["left"] * 3 + ["right"] + ["left"] * 2
    (fault,) = result.faults
    assert (fault.code, fault.severity) == ("SL857", "warning")
    assert "`left`" in fault.what
    assert "`right`" in fault.what
    assert "step 1" in fault.what


def test_data_that_ends_between_two_steps_is_told_of_in_no_case() -> None:
    assert two(NoLength(8), run={"max_epochs": 1})[1].faults == ()


def test_a_phase_that_runs_on_some_steps_only_counts_there_only() -> None:
    class Rare(Two):
        @sl.phase(trains="right", every=2)
        def second(self, batch: Tensor) -> dict[str, Tensor]:
            return {"right": self.model(batch).square().mean()}

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    run = Rare(model=model, data=batches(10), optimizers=OPTIMIZERS, log=OFF, run={"max_epochs": 1})
    assert run.fit().steps == 2, "4 + 3, and the third step needs 4 of the 3 that are left"


def test_a_custom_step_that_runs_out_after_an_update_is_told_of() -> None:
    class Run(sl.Trainer):
        def custom_step(self, ops: Any, batch: Tensor) -> None:
            for owner in ("left", "right"):
                ops.zero()
                ops.backward({owner: self.model(batch if owner == "left" else ops.draw()).square().mean()})
                ops.update(owner)

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    run = Run(model=model, data=batches(3), optimizers=OPTIMIZERS, log=OFF, run={"max_epochs": 1})
    result = run.fit()
    assert result.steps == 1
    assert [fault.code for fault in result.faults] == ["SL857"]


def test_progress_knows_how_many_steps_there_will_be() -> None:
    trainer, result = two(batches(10), run={"max_epochs": 2})
    program = trainer._assembled().program
    assert program.steps_in(20) == result.steps == 5
    for turns in range(40):
        steps = program.steps_in(turns)
        assert sum(map(program.turns, range(steps))) <= turns < sum(map(program.turns, range(steps + 1)))
