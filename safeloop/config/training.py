"""Rules about parts of a training that do not fit together: clipping, schedules, averages.

Each looks at the written tree, so that it speaks even where something else is wrong.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from safeloop.checks.config.training import AverageNeverTaken, ClippedTwice, ScheduleNeverMoves
from safeloop.checks.config.values import ArgumentsRefused
from safeloop.config.errors import Problem
from safeloop.config.nodes import Node, Path, dotted, is_set, number

CLIPPINGS = ("max_norm", "clip_value", "agc")


def training_problems(root: Node, given: Collection[str]) -> Iterator[Problem]:
    """Everything that these rules refuse; `given` is what the caller has as objects."""
    for path, optimizer in _optimizers(root):
        yield from _clippings(path, optimizer)
        scheduler = optimizer.child("scheduler")
        if scheduler is not None and isinstance(scheduler.value, dict):
            yield from _too_short(root, (*path, "scheduler"), scheduler)
            yield from _inner_paces((*path, "scheduler"), scheduler)
            yield from _unmoved(root, (*path, "scheduler"), scheduler, given)
    yield from _never_averaged(root)


def _optimizers(root: Node) -> list[tuple[Path, Node]]:
    section = root.child("optimizers")
    named = section.value.items() if section is not None and isinstance(section.value, dict) else ()
    return [(("optimizers", name), node) for name, node in named if isinstance(node.value, dict)]


def _clippings(path: Path, optimizer: Node) -> Iterator[Problem]:
    kinds = [kind for kind in optimizer.value if kind in CLIPPINGS and is_set(optimizer, kind)]
    for second in kinds[1:]:
        node = optimizer.value[second]
        what = f"`{second}` beside `{kinds[0]}`: two kinds of clipping"
        fix = f"keep one: take out `{second}` or `{kinds[0]}`"
        yield Problem(ClippedTwice.fault(what, fix=fix), node.key or node.at, dotted((*path, second)))


def _too_short(root: Node, path: Path, scheduler: Node) -> Iterator[Problem]:
    """A schedule of a fixed length that the run outlives."""
    total, per = scheduler.child("total_steps"), scheduler.child("per")
    unit = "epochs" if per is not None and per.value == "epoch" else "steps"
    last, length = number(root.find(("run", f"max_{unit}"))), number(total)
    if total is not None and length is not None and last is not None and last > length > 0:
        what = f"the schedule ends after {length} {unit}, the run after {last}; torch raises in between"
        at = dotted((*path, "total_steps"))
        yield Problem(ArgumentsRefused.fault(what, fix=f"set total_steps to {last}"), total.at, at)


def _inner_paces(path: Path, scheduler: Node) -> Iterator[Problem]:
    inner = scheduler.child("schedulers")
    for index, one in enumerate(inner.value if inner is not None and isinstance(inner.value, list) else ()):
        per = one.child("per")
        if per is not None:
            what = "an inner schedule moves with the outer one, and has no `per` of its own"
            fix = f"move `per: {per.value}` up, beside `schedulers`"
            at = dotted((*path, "schedulers", index, "per"))
            yield Problem(ScheduleNeverMoves.fault(what, fix=fix), per.key or per.at, at)


def _unmoved(root: Node, path: Path, scheduler: Node, given: Collection[str]) -> Iterator[Problem]:
    """A schedule by a metric that is never measured."""
    metric, kind = scheduler.child("metric"), scheduler.child("type")
    if metric is None or kind is None or kind.value != "ReduceLROnPlateau" or not isinstance(metric.value, str):
        return
    why, fix = _unmeasured(root, metric.value, given)
    if why:
        what = f"the schedule looks at `{metric.value}`, and {why}"
        yield Problem(ScheduleNeverMoves.fault(what, fix=fix), metric.at, dotted((*path, "metric")))


def _unmeasured(root: Node, metric: str, given: Collection[str]) -> tuple[str, str]:
    """Why a metric is never measured, and what to do; empty where it may be."""
    paths = (("data", "eval"), ("evaluate", "every"), ("evaluate", "loss"))
    held_out, every, loss = (root.find(path) for path in paths)
    if "eval_data" not in given and (held_out is None or held_out.value is None):
        return "there is no evaluation data", "add `data.eval`, or pass `eval_data=` to the Trainer"
    if every is None or every.value is None:
        return "evaluations come only at the end of the run", "set `evaluate.every` to a number of steps"
    if metric == "loss/eval":
        is_off = loss is not None and loss.value is False
        return ("`evaluate.loss` is false", "take out `evaluate.loss: false`") if is_off else ("", "")
    has_code = "trainer" in given or is_set(root, "trainer")
    section = root.child("metrics")
    names = list(section.value) if section is not None and isinstance(section.value, dict) else []
    if has_code or any(metric == name or metric.startswith(f"{name}/") for name in names):
        return "", ""
    return "no metric has that name", f"name one of: {', '.join([*names, 'loss/eval'])}"


def _never_averaged(root: Node) -> Iterator[Problem]:
    start = root.find(("average", "start"))
    last, first = number(root.find(("run", "max_steps"))), number(start)
    if start is not None and last is not None and first is not None and first > last > 0:
        what = f"the average starts after step {first:g}, and the run ends after step {last:g}"
        fix = f"set start to {max(1, int(0.75 * last))} or so"
        yield Problem(AverageNeverTaken.fault(what, fix=fix), start.at, "average.start")
