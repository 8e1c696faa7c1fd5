"""Terms that stay away, are constant, or reach nothing: counted on every step, and told where it never ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import safeloop as sl

OFF: dict[str, Any] = {"sinks": []}
SGD: dict[str, Any] = {"type": "SGD", "lr": 0.1}
LEFT, RIGHT = {**SGD, "params": ["0.*"]}, {**SGD, "params": ["1.*"]}
LEVELS = ["off", "standard", "full"]


def pair() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))


def run(
    compute: Any, model: nn.Module | None = None, steps: int = 1, batches: int = 1, **sections: Any
) -> sl.RunResult:
    class Run(sl.Trainer):
        def losses(self, batch: Tensor) -> Any:
            return compute(self, batch)

    sections = {"optimizers": SGD, "run": {"max_steps": steps}, "log": OFF, **sections}
    return Run(model=model or pair(), data=[torch.ones(2, 4)] * batches, **sections).fit()


def fault_of(compute: Any, **sections: Any) -> sl.Fault:
    with pytest.raises(sl.FaultError) as caught:
        run(compute, **sections)
    return caught.value.fault


def inactive(tmp_path: Path, compute: Any, steps: int = 4, **sections: Any) -> dict[str, float]:
    """term -> the fraction of its turns on which it was inactive, as logged."""
    section = {"max_steps": steps, "dir": str(tmp_path)}
    result = run(compute, **{"run": section, "log": {"every": steps, "sinks": ["jsonl"]}, **sections})
    assert result.faults == ()
    assert result.dir is not None
    record = json.loads((result.dir / "metrics.jsonl").read_text().splitlines()[0])
    return {tag.rpartition("/")[2]: value for tag, value in record.items() if tag.startswith("safety/inactive/")}


def fit(trainer: sl.Trainer, batch: Tensor) -> Tensor:
    return trainer.model(batch).square().mean()


# --------------------------------------------------------------------------------------------- a phase and its excuses


class Both(sl.Trainer):
    """`right` is reached by `bonus` alone."""

    @sl.phase(trains=["left", "right"])
    def fit_both(self, batch: Tensor) -> dict[str, Tensor]:
        terms = {"value": self.model[0](batch).square().mean()}
        return terms | self.bonus(batch)

    def bonus(self, batch: Tensor) -> dict[str, Tensor]:
        return {}


PERMITTED: dict[str, Any] = {"losses": {"bonus": {"may_be_constant": True}}}


def both(bonus: Any, steps: int = 3, **sections: Any) -> sl.RunResult:
    cls = type("Run", (Both,), {"bonus": bonus})
    sections = {"optimizers": {"left": LEFT, "right": RIGHT}, "run": {"max_steps": steps}, "log": OFF, **sections}
    return cls(model=pair(), data=[torch.ones(2, 4)], **sections).fit()


def test_a_permitted_constant_excuses_an_optimizer_that_gets_nothing_on_the_first_batch() -> None:
    def bonus(self: sl.Trainer, batch: Tensor) -> dict[str, Tensor]:
        return {"bonus": self.model(batch).mean() if self.step else torch.tensor(0.0)}

    assert both(bonus, **PERMITTED).faults == ()


def test_a_permitted_term_that_is_absent_excuses_it_too() -> None:
    def bonus(self: sl.Trainer, batch: Tensor) -> dict[str, Tensor]:
        return {"bonus": self.model(batch).mean()} if self.step else {}

    assert both(bonus, **PERMITTED).faults == ()


@pytest.mark.parametrize("first", ["absent", "constant"])
def test_the_excuse_ends_with_the_first_batch_on_which_the_term_is_there(first: str) -> None:
    def bonus(self: sl.Trainer, batch: Tensor) -> dict[str, Tensor]:
        if self.step < 2:
            return {} if first == "absent" else {"bonus": torch.tensor(0.0)}
        return {"bonus": self.model[0](batch).mean()}

    with pytest.raises(sl.FaultError) as caught:
        both(bonus, **PERMITTED)
    assert caught.value.fault.code == "SL413"
    assert "`right`" in caught.value.fault.what


def test_a_permitted_term_that_is_there_excuses_nothing() -> None:
    def bonus(self: sl.Trainer, batch: Tensor) -> dict[str, Tensor]:
        return {"bonus": self.model[0](batch).mean()}

    with pytest.raises(sl.FaultError, match="SL413"):
        both(bonus, **PERMITTED)


def test_a_permitted_constant_of_another_phase_excuses_nothing() -> None:
    class Two(Both):
        @sl.phase(trains="right")
        def second(self, batch: Tensor) -> dict[str, Tensor]:
            return {"bonus": self.model(batch).mean() if self.step else torch.tensor(0.0)}

    optimizers = {"left": LEFT, "right": RIGHT}
    with pytest.raises(sl.FaultError) as caught:
        Two(
            model=pair(), data=[torch.ones(2, 4)], optimizers=optimizers, run={"max_steps": 3}, log=OFF, **PERMITTED
        ).fit()
    assert caught.value.fault.code == "SL413"


# ----------------------------------------------------------------------------------------------------- nothing is due


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", [{"type": "SGD", "lr": 1.0}, {"type": "AdamW", "lr": 1.0, "fused": False}])
def test_a_step_on_which_no_term_is_due_changes_nothing(level: str, kind: dict[str, Any]) -> None:
    weights: list[Tensor] = []
    calls: list[int] = []

    def compute(trainer: sl.Trainer, batch: Tensor) -> dict[str, Tensor]:
        weights.append(trainer.model[1].bias.detach().clone())
        return {"rare": fit(trainer, batch)}

    class Run(sl.Trainer):
        def losses(self, batch: Tensor) -> dict[str, Tensor]:
            return compute(self, batch)

    trainer = Run(
        model=pair(),
        data=[torch.ones(2, 4)],
        optimizers={**kind, "scheduler": {"type": "StepLR", "step_size": 1, "gamma": 0.5}},
        losses={"rare": {"every": 2}},
        run={"max_steps": 5},
        log=OFF,
        audit={"level": level},
    )
    optimizer = trainer._assembled().owners["main"].optimizer
    optimizer.register_step_post_hook(lambda *_: calls.append(trainer.step))
    result = trainer.fit()
    assert result.faults == ()
    assert result.steps == 5
    assert calls == [0, 2, 4], "the optimizer is not stepped where nothing is due"
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[2], weights[3])
    assert optimizer.param_groups[0]["lr"] == 0.125, "nor is its schedule: three updates"


def test_lbfgs_is_left_alone_where_no_term_is_due() -> None:
    seen: list[Tensor] = []

    def compute(trainer: sl.Trainer, batch: Tensor) -> dict[str, Tensor]:
        if not seen or trainer.step >= len(seen):
            seen.append(trainer.model[1].bias.detach().clone())
        return {"rare": fit(trainer, batch)}

    lbfgs = {"type": "LBFGS", "lr": 0.1, "max_iter": 2}
    result = run(compute, steps=4, optimizers=lbfgs, losses={"rare": {"every": 2}})
    assert (result.steps, result.faults) == (4, ())
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("level", LEVELS)
def test_a_loss_function_that_returns_no_term_is_refused(level: str) -> None:
    fault = fault_of(
        lambda trainer, batch: {} if trainer.step else {"a": fit(trainer, batch)}, steps=3, audit={"level": level}
    )
    assert fault.code == "SL401"


@pytest.mark.parametrize("level", LEVELS)
def test_a_permitted_term_may_leave_a_batch_without_any(level: str) -> None:
    losses = {"a": {"may_be_constant": True}}
    result = run(
        lambda t, batch: {} if t.step % 2 else {"a": fit(t, batch)}, steps=4, losses=losses, audit={"level": level}
    )
    assert result.faults == ()


# ---------------------------------------------------------------------------------------- a leaf in the place of a term


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("late", [0, 25])
def test_a_leaf_that_is_no_parameter_is_refused_on_every_step(level: str, late: int) -> None:
    def compute(trainer: sl.Trainer, batch: Tensor) -> dict[str, Tensor]:
        cure = torch.tensor(0.0, requires_grad=True)
        return {"fit": fit(trainer, batch), "margin": cure if trainer.step >= late else fit(trainer, batch)}

    fault = fault_of(compute, steps=30, audit={"level": level})
    assert fault.code == "SL409"
    assert fault.names == ("margin",)


@pytest.mark.parametrize("level", LEVELS)
def test_a_leaf_that_is_permitted_is_counted(level: str, tmp_path: Path) -> None:
    def compute(trainer: sl.Trainer, batch: Tensor) -> dict[str, Tensor]:
        active = trainer.step == 1
        return {
            "fit": fit(trainer, batch),
            "margin": fit(trainer, batch) if active else torch.tensor(0.0, requires_grad=True),
        }

    losses = {"margin": {"may_be_constant": True}}
    assert inactive(tmp_path, compute, losses=losses, audit={"level": level}) == {"margin": 0.75}


def test_an_absent_term_is_counted(tmp_path: Path) -> None:
    def compute(trainer: sl.Trainer, batch: Tensor) -> dict[str, Tensor]:
        return {"fit": fit(trainer, batch)} | ({"margin": fit(trainer, batch)} if trainer.step < 3 else {})

    assert inactive(tmp_path, compute, losses={"margin": {"may_be_constant": True}}) == {"margin": 0.25}


def test_a_term_that_is_not_due_is_not_counted(tmp_path: Path) -> None:
    def compute(trainer: sl.Trainer, batch: Tensor) -> dict[str, Tensor]:
        return {"fit": fit(trainer, batch), "margin": fit(trainer, batch)}

    assert inactive(tmp_path, compute, losses={"margin": {"may_be_constant": True, "every": 2}}) == {}


def test_inactive_is_a_fraction_under_accumulation(tmp_path: Path) -> None:
    calls: list[int] = []

    def compute(trainer: sl.Trainer, batch: Tensor) -> dict[str, Tensor]:
        calls.append(1)
        return {"fit": fit(trainer, batch), "margin": fit(trainer, batch) if len(calls) % 4 == 1 else torch.tensor(0.0)}

    found = inactive(
        tmp_path,
        compute,
        losses={"margin": {"may_be_constant": True}},
        batches=4,
        accumulate={"micro_batches": 4, "weight_by": "batches"},
        run={"max_steps": 4, "dir": str(tmp_path)},
    )
    assert found == {"margin": 0.75}


def test_a_parameter_itself_is_a_term() -> None:
    class Scalar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(1.0))

    model = Scalar()
    assert run(lambda t, _: {"w": t.model.w}, model, steps=25, losses={"w": {"may_be_constant": True}}).faults == ()
    assert model.w.item() == pytest.approx(1 - 25 * 0.1, abs=1e-5)


# ---------------------------------------------------------------------------------- a term that never reached a thing

NEVER: dict[str, Any] = {
    "absent": lambda t, b: {},
    "constant": lambda t, b: {"margin": torch.tensor(0.0)},
    "leaf": lambda t, b: {"margin": torch.tensor(0.0, requires_grad=True)},
    "graph without a parameter": lambda t, b: {"margin": 2 * torch.tensor(0.0, requires_grad=True)},
}


@pytest.mark.parametrize("kind", NEVER)
@pytest.mark.parametrize("level", LEVELS)
def test_a_permitted_term_that_never_reached_a_parameter_is_told_once(kind: str, level: str) -> None:
    result = run(
        lambda t, b: {"fit": fit(t, b) * 1e-3, **NEVER[kind](t, b)},
        steps=120,
        losses={"margin": {"may_be_constant": True}},
        audit={"level": level},
    )
    (fault,) = result.faults
    assert (fault.code, fault.severity, fault.names) == ("SL415", "warning", ("margin",))
    assert "100" in fault.what


@pytest.mark.parametrize("kind", NEVER)
def test_a_permitted_term_that_reached_one_once_is_not(kind: str) -> None:
    result = run(
        lambda t, b: {"fit": fit(t, b) * 1e-3, **(NEVER[kind](t, b) if t.step != 60 else {"margin": fit(t, b)})},
        steps=130,
        losses={"margin": {"may_be_constant": True}},
    )
    assert result.faults == ()


# ----------------------------------------------------------------------------------------- declared and never returned


class Misspelt(sl.Trainer):
    @sl.phase(trains="left")
    def first(self, batch: Tensor) -> dict[str, Tensor]:
        return {"recon": self.model[0](batch).square().mean()}

    @sl.phase(trains="right", every=2)
    def second(self, batch: Tensor) -> dict[str, Tensor]:
        return {"value": self.model(batch).square().mean()}


def misspelt(**losses: Any) -> sl.Trainer:
    return Misspelt(
        model=pair(),
        data=[torch.ones(2, 4)],
        optimizers={"left": LEFT, "right": RIGHT},
        losses=losses,
        run={"max_steps": 3},
        log=OFF,
    )


@pytest.mark.parametrize("entry", ["fit", "check", "plan"])
def test_a_declared_term_that_no_phase_returns_is_refused(entry: str) -> None:
    trainer = misspelt(reconn={"weight": 0.5}, value={})
    with pytest.raises(sl.FaultError) as caught:
        getattr(trainer, entry)()
    fault = caught.value.fault
    assert fault.code == "SL407"
    assert fault.names == ("reconn",)
    assert "recon" in fault.what
    assert "first" in fault.where
    assert "second" in fault.where


def test_declared_terms_of_several_phases_are_right() -> None:
    trainer = misspelt(recon={"weight": 0.5}, value={})
    assert trainer.check() == []
    assert trainer.fit().faults == ()
    assert misspelt(recon={}, other={"may_be_constant": True}).fit().faults == ()
