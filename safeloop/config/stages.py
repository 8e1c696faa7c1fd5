"""What the models cannot see of the `stages` section; and each stage as a config of its own, for all other rules."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from safeloop.checks.config.stages import StagesRefused
from safeloop.config.errors import Problem
from safeloop.config.nodes import Node, Path, dotted, is_set


def stages_alone(root: Node) -> list[tuple[Path, Node]]:
    """The path of each stage, and the config as it is while that stage lasts; the config itself without stages."""
    section = root.child("stages")
    if section is None or not isinstance(section.value, dict) or not section.value:
        return [((), root)]
    rest = {key: node for key, node in root.value.items() if key not in ("stages", "optimizers")}
    found: list[tuple[Path, Node]] = []
    for name, stage in section.value.items():
        if isinstance(stage.value, dict) and is_set(stage, "optimizers"):
            own = {"optimizers": stage.value["optimizers"], "run": _run(root, stage)}
            found.append((("stages", name), Node({**rest, **own}, root.at, root.key)))
    return found


def placed_in(stage: Path, problem: Problem) -> Problem:
    """A problem that was found in a stage alone, with the path of the whole config."""
    is_own = problem.path == "optimizers" or problem.path.startswith("optimizers.")
    return replace(problem, path=f"{dotted(stage)}.{problem.path}") if stage and is_own else problem


def stage_problems(root: Node, given: Collection[str]) -> Iterator[Problem]:
    """What does not go together with stages."""
    section = root.child("stages")
    if section is None or not isinstance(section.value, dict) or not section.value:
        return
    if is_set(root, "optimizers"):
        node = root.value["optimizers"]
        what = "`optimizers` beside `stages`: each parameter would have two owners at a time"
        fix = "move it into a stage, or take `stages` out"
        yield Problem(StagesRefused.fault(what, fix=fix), node.key or node.at, "optimizers")
    if "optimizers" in given:
        what = "`stages` beside ready optimizers: nothing says in which stage they train"
        fix = "describe the optimizers in the stages, or call `fit` once for each optimizer"
        yield Problem(StagesRefused.fault(what, fix=fix), section.key or section.at, "stages")


def _run(root: Node, stage: Node) -> Node:
    """The `run` section while a stage lasts: it ends after the stage's steps."""
    run = root.child("run") or Node({}, root.at)
    steps = stage.child("max_steps") or Node(1, stage.at)  # that it is missing is said elsewhere
    return Node({**run.value, "max_steps": steps}, run.at, run.key) if isinstance(run.value, dict) else run
