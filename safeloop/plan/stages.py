"""The plan of a run in stages: a step plan for each, in the order in which they train."""

from __future__ import annotations

import json
from dataclasses import dataclass

from safeloop.plan.plan import StepPlan


@dataclass(frozen=True, slots=True)
class StagePlan:
    """What a step does while a stage lasts."""

    name: str
    steps: int
    plan: StepPlan


@dataclass(frozen=True, slots=True)
class StagedPlan:
    """Stages one after the other; counts, data, logs and evaluations go on from one to the next."""

    stages: tuple[StagePlan, ...]

    def __str__(self) -> str:
        return self._text([str(stage.plan) for stage in self.stages])

    def why(self) -> str:
        """The plans with the reason for each line."""
        return self._text([stage.plan.why() for stage in self.stages])

    def json(self) -> str:
        """The plans as JSON."""
        stages = [{"stage": one.name, "steps": one.steps, **json.loads(one.plan.json())} for one in self.stages]
        return json.dumps({"stages": stages}, indent=2)

    def _text(self, plans: list[str]) -> str:
        blocks, done = [], 0
        for stage, plan in zip(self.stages, plans, strict=True):
            head = f"stage {stage.name}   steps {done + 1:,} to {done + stage.steps:,}"
            if not stage.steps:
                head = f"stage {stage.name}   never reached: `run.max_steps` is {done:,}"
            done += stage.steps
            blocks.append("\n".join([head, *(f"  {line}" for line in plan.splitlines())]))
        return "\n".join(blocks)
