"""What the models cannot see: targets, arguments that torch refuses, sections that a run needs, suspicious values.

Every rule looks at the written tree, so that it speaks even where something else is wrong.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from pydantic import BaseModel, ValidationError
from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.utils.data import Dataset

from safeloop.checks.config.keys import MissingKey
from safeloop.checks.config.run import NoLoss
from safeloop.checks.config.target import TargetArguments
from safeloop.checks.config.values import ArgumentsRefused, SuspiciousValue
from safeloop.config.combine import combine_problems
from safeloop.config.errors import Problem
from safeloop.config.losses import LOSSES, dry_construct_loss
from safeloop.config.nodes import Node, Path, dotted, is_set, number
from safeloop.config.penalties import penalty_problems, penalty_warnings
from safeloop.config.stages import placed_in, stage_problems, stages_alone
from safeloop.config.training import training_problems
from safeloop.faults import FaultError
from safeloop.optim.specs import OPTIMIZERS, dry_construct
from safeloop.signatures import Refusal
from safeloop.target import argument_faults, nested_target, resolve_target

LARGE_LR = 10.0


class _Updating(type):
    def __subclasscheck__(cls, other: type) -> bool:
        return all(callable(getattr(other, name, None)) for name in ("update", "compute", "reset"))


class Updating(metaclass=_Updating):
    """A metric with `update`, `compute` and `reset`."""


SLOTS: dict[Path, tuple[Any, ...]] = {
    ("trainer",): (object,),
    ("model",): (nn.Module,),
    ("data", "train"): (Dataset, Iterable),
    ("data", "eval"): (Dataset, Iterable),
    ("optimizers", "*"): (Optimizer,),
    ("losses", "*"): (Callable,),
    ("metrics", "*"): (Callable, Updating),
}
"""Where a target may stand -> what its class must be. That a trainer is a Trainer is checked where it is made."""


def problems_of(root: Node, allow: Collection[str], given: Collection[str]) -> Iterator[Problem]:
    """Everything that the rules refuse; what is about optimizers, for each stage."""
    yield from stage_problems(root, given)
    for stage, alone in stages_alone(root):
        for problem in _problems_alone(alone, allow, given):
            yield placed_in(stage, problem)


def _problems_alone(root: Node, allow: Collection[str], given: Collection[str]) -> Iterator[Problem]:
    yield from _missing(root, given)
    yield from _losses(root, given)
    yield from _targets(root, allow)
    yield from _refused(root)
    yield from training_problems(root, given)
    yield from combine_problems(root)
    yield from penalty_problems(root, given)


def warnings_of(root: Node) -> Iterator[Problem]:
    """Everything that is possible but rarely meant."""
    found = [placed_in(stage, one) for stage, alone in stages_alone(root) for one in _warnings_alone(alone)]
    yield from dict.fromkeys(found)


def _warnings_alone(root: Node) -> Iterator[Problem]:
    steps = root.find(("run", "max_steps"))
    if steps is not None and number(steps) == 0:
        yield _suspicious(steps, ("run", "max_steps"), "0: nothing is trained", "write the number of steps")
    yield from penalty_warnings(root)
    for path, node in root.walk():
        if path[:1] == ("optimizers",) and path[-1] == "lr" and _is_own(path):
            value = number(node)
            if value == 0:
                yield _suspicious(
                    node, path, "0: these parameters never move", "to keep them still, list them under `frozen`"
                )
            elif value is not None and value >= LARGE_LR and math.isfinite(value):
                yield _suspicious(node, path, f"{value:g}: most models diverge", "usual values lie between 1e-5 and 1")


def _is_own(path: Path) -> bool:
    """Whether `lr` is the optimizer's or a group's own."""
    return len(path) == 3 or (len(path) == 5 and path[2] == "groups")


def _suspicious(node: Node, path: Path, what: str, fix: str) -> Problem:
    return Problem(SuspiciousValue.fault(f"{path[-1]} is {what}", fix=fix), node.at, dotted(path))


def _missing(root: Node, given: Collection[str]) -> Iterator[Problem]:
    run = root.child("run")
    if run is None or (
        isinstance(run.value, dict) and not any(is_set(run, key) for key in ("max_steps", "max_epochs"))
    ):
        place = (run.key or run.at) if run is not None else root.at
        fix = "add `max_steps: 1000` or `max_epochs: 10` to `run`"
        yield Problem(
            MissingKey.fault("the run has no end: neither 'max_steps' nor 'max_epochs'", fix=fix), place, "run"
        )
    needed = {"model": ("model",), "data": ("data", "train"), "optimizers": ("optimizers",)}
    for name, path in needed.items():
        if name in given or _is_written(root, path):
            continue
        section = root.find(path[:-1]) or root
        fix = f"add `{dotted(path)}`, or pass `{name}=` to the Trainer"
        yield Problem(MissingKey.fault(f"missing key {path[-1]!r}", fix=fix), section.key or section.at, dotted(path))
    policy, patience = root.find(("nonfinite", "policy")), root.find(("nonfinite", "max_consecutive"))
    if policy is not None and policy.value == "skip" and (patience is None or patience.value is None):
        fix = "add `max_consecutive: 10`, after which the run stops"
        what = "missing key 'max_consecutive': a skip needs a patience"
        yield Problem(MissingKey.fault(what, fix=fix), policy.at, "nonfinite.max_consecutive")


def _is_written(root: Node, path: Path) -> bool:
    """Whether something stands there, or a section on the way is no section, which is another error."""
    for end in range(1, len(path) + 1):
        node = root.find(path[:end])
        if node is None or node.value in (None, {}):
            return False
        if not isinstance(node.value, dict):
            return True
    return True


def _losses(root: Node, given: Collection[str]) -> Iterator[Problem]:
    if "trainer" in given or "losses" in given or is_set(root, "trainer"):
        return
    section = root.child("losses")
    if section is None or section.value in (None, {}):
        fix = "add `losses: {name: {type: ...}}`, or name your Trainer subclass under `trainer`"
        yield Problem(NoLoss.fault("the config has no loss and no trainer", fix=fix), root.at, "losses")
        return
    for name, term in section.value.items() if isinstance(section.value, dict) else ():
        if isinstance(term.value, dict) and not term.value.keys() & {"type", "target"}:
            fix = "add `type:` or `target:`, or name your Trainer subclass under `trainer`"
            what = f"loss term {name!r} does not say how it is computed"
            yield Problem(NoLoss.fault(what, fix=fix), term.key or term.at, f"losses.{name}")


def _targets(root: Node, allow: Collection[str]) -> Iterator[Problem]:
    for slot, bases in SLOTS.items():
        for path in _places(root, slot):
            yield from _target(root, path, bases, allow)


def _places(root: Node, slot: Path) -> list[Path]:
    if slot[-1] != "*":
        return [slot]
    section = root.child(slot[0])
    return (
        [(slot[0], name) for name in section.value] if section is not None and isinstance(section.value, dict) else []
    )


def _target(root: Node, path: Path, bases: tuple[Any, ...], allow: Collection[str]) -> Iterator[Problem]:
    node = root.find((*path, "target"))
    if node is None or not isinstance(node.value, str):
        return
    args = root.find((*path, "args"))
    try:
        cls = resolve_target(node.value, bases, allow)
    except FaultError as error:
        yield Problem(error.fault, node.at, dotted((*path, "target")))
    else:
        plain = args.plain() if args is not None else {}
        is_built = path != ("trainer",) and isinstance(plain, (dict, list))
        if path[0] == "optimizers" and len(path) == 2 and isinstance(plain, dict):
            first = next(iter(inspect.signature(cls).parameters), "params")
            yield from _optimizer_class(cls, node, path)
            if args is not None and first in plain:
                what = f"`{first}` is what the optimizer updates, which `params` patterns say"
                fault = TargetArguments.fault(what, fix=f"take out `args.{first}`, and write `params: [pattern]`")
                yield Problem(fault, args.value[first].key or args.at, dotted((*path, "args", first)))
            plain = {**plain, first: []}
        for name, fault in argument_faults(cls, plain) if is_built else ():
            wrong = args.child(name) if args is not None and name is not None else None
            at = (
                (wrong.key or wrong.at) if wrong is not None else (args.key or args.at) if args is not None else node.at
            )
            yield Problem(fault, at, dotted((*path, "args", *([name] if name is not None else []))))
    for inner, one in args.walk() if args is not None else ():
        if inner and isinstance(one.value, dict) and nested_target(one.plain()) is not None:
            yield from _target(root, (*path, "args", *inner), (object,), allow)


def _optimizer_class(cls: type[Any], node: Node, path: Path) -> Iterator[Problem]:
    """An optimizer that computes the loss again inside its step, which only torch's LBFGS may."""
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty and not issubclass(cls, LBFGS):
        what = f"`{cls.__name__}.step` needs a closure: it computes the loss several times in one update"
        fix = "choose an optimizer whose `step()` takes no argument, or `type: LBFGS`"
        yield Problem(ArgumentsRefused.fault(what, fix=fix), node.at, dotted((*path, "target")))


def _refused(root: Node) -> Iterator[Problem]:
    for family, models, construct in (
        ("optimizers", OPTIMIZERS, dry_construct),
        ("losses", LOSSES, dry_construct_loss),
    ):
        section = root.child(family)
        for name, node in section.value.items() if section is not None and isinstance(section.value, dict) else ():
            spec = _spec(models, node)
            refused = construct(spec) if spec is not None else None
            if refused is not None:
                yield refused_problem(root, (family, name), refused)


def _spec(models: Any, node: Node) -> Any:
    """The spec of what is valid in a section; what is not is reported elsewhere."""
    kind = node.child("type")
    model: type[BaseModel] | None = models.get(kind.value) if kind is not None and isinstance(kind.value, str) else None
    if model is None:
        return None
    plain = node.plain()
    for _ in range(2):
        try:
            return model.model_validate(plain)
        except ValidationError as error:
            plain = {key: value for key, value in plain.items() if key not in {one["loc"][0] for one in error.errors()}}
    return None


def refused_problem(root: Node, path: Path, refused: Refusal) -> Problem:
    """The problem of arguments that torch refused, at the argument to blame."""
    whole = (*path, *refused.path)
    node = root.find(whole) or root.find(path) or root
    at = node.at if refused.path and not isinstance(node.value, dict) else node.key or node.at
    name = refused.path[-1] if refused.path else path[-1]
    fix = "change it, or the argument that it depends on"
    return Problem(ArgumentsRefused.fault(f"{name} refused: {refused.reason}", fix=fix), at, dotted(whole))
