"""The stages of a run: one after the other, each with optimizers of its own. A run without stages has a single one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from safeloop.assembly import Assembly, assemble
from safeloop.audit.ledger import FaultLedger
from safeloop.ingredients import Ingredients
from safeloop.plan import StepPlan
from safeloop.plan.stages import StagedPlan, StagePlan


@dataclass(frozen=True)
class Stage:
    """A part of the run in which each parameter has one and the same owner."""

    name: str
    """empty where the run has no stages"""
    first: int
    """how many steps come before it"""
    end: int | None
    """after how many steps of the run it is over; None: when the data ends"""
    assembly: Assembly

    def begin(self) -> None:
        """Start the epochs of its schedules anew; the first stage's begin with the run, without a look at the data."""
        self.assembly.audit.first = self.first
        if self.first:
            self.assembly.epochs.begin()

    def let_go(self) -> None:
        """Free what its optimizers remember: other owners follow."""
        for owner in self.assembly.owners.values():
            owner.optimizer.state.clear()


def assemble_stages(given: Ingredients, device: torch.device, ledger: FaultLedger) -> tuple[Stage, ...]:
    """Put every stage together before the first step, so that what is wrong with the last one is said at once.

    Data, loss weights, averages and the gradient scale are shared; owners, schedules and the plan are each stage's own.

    Raises:
        FaultError: whatever `assemble` raises, for any stage.
    """
    config = given.config
    if not config.stages:
        assembly = assemble(given, device, ledger)
        return (Stage("", 0, config.run.max_steps, assembly),)
    stages: list[Stage] = []
    first = 0
    for name, section in config.stages.items():
        own = replace(given, loaded=given.loaded.within(("stages", name), optimizers=section.optimizers))
        assembly = assemble(own, device, ledger, after=stages[0].assembly if stages else None)
        end = first + section.max_steps
        if config.run.max_steps is not None:
            end = min(end, config.run.max_steps)
        stages.append(Stage(name, first, end, assembly))
        first = end
    return tuple(stages)


def run_plan(stages: Sequence[Stage]) -> StepPlan | StagedPlan:
    """The plan of the whole run."""
    if len(stages) == 1 and not stages[0].name:
        return stages[0].assembly.plan
    return StagedPlan(tuple(StagePlan(s.name, (s.end or s.first) - s.first, s.assembly.plan) for s in stages))
