"""Rules about the `penalties` section, and about what stands beside it.

Each looks at the written tree, so that it speaks even where something else is wrong.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from safeloop.checks.config.keys import MissingKey
from safeloop.checks.penalties.declared import PenaltyMisdeclared, PenaltyWithoutEffect
from safeloop.config.errors import Problem
from safeloop.config.nodes import Node, Path, dotted, is_set, number
from safeloop.config.places import nearest


def penalty_problems(root: Node, given: Collection[str]) -> Iterator[Problem]:
    """Everything that is wrong with penalties; `given` is what the caller has as objects."""
    has_code = "losses" in given or is_set(root, "trainer")
    losses = _sections(root, "losses")
    for name, section in _sections(root, "penalties").items():
        path: Path = ("penalties", name)
        if name in losses:
            what = f"`{name}` is the name of a loss and of a penalty"
            yield _problem(path, section, what, "give one of them another name; `weight` and `every` stand in both")
        if not isinstance(section.value, dict):
            continue
        yield from _of_code(path, section) if has_code else _of_config(path, section, losses)


def penalty_warnings(root: Node) -> Iterator[Problem]:
    """Penalties that are computed for nothing."""
    for name, section in _sections(root, "penalties").items():
        weight = section.child("weight")
        if weight is not None and number(weight) == 0:
            what = f"`penalties.{name}` has weight 0: it is computed and trains nothing"
            fault = PenaltyWithoutEffect.fault(what, fix="give it a weight, or take it out")
            yield Problem(fault, weight.at, f"penalties.{name}.weight")


def _of_code(path: Path, section: Node) -> Iterator[Problem]:
    for key in ("of", "at", "targets"):
        if is_set(section, key):
            what = f"`{key}` has no effect: the Trainer's code says it"
            fix = f"take it out; in code: `self.penalty(function, at=x)` under the name `{path[-1]}`"
            yield _problem((*path, key), section.value[key], what, fix)


def _of_config(path: Path, section: Node, losses: Collection[str]) -> Iterator[Problem]:
    kind = section.child("type")
    needed = {"of": "`of: loss.NAME` or `of: output`", "at": "`at: batch.0`"}
    if kind is not None and kind.value == "forces":
        needed["targets"] = "`targets: batch.1`"
    for key, example in needed.items():
        if not is_set(section, key):
            fix = f"add {example} to {dotted(path)}, or compute the penalty in a Trainer of your own"
            fault = MissingKey.fault(f"missing key {key!r}: the penalty does not say it", fix=fix)
            yield Problem(fault, section.key or section.at, dotted((*path, key)))
    of = section.child("of")
    if of is None or not isinstance(of.value, str) or not of.value.startswith("loss."):
        return
    loss = of.value.removeprefix("loss.")
    if loss not in losses:
        near = nearest(loss, list(losses))
        fix = (f"did you mean 'loss.{near}'? " if near else "") + f"the losses are {', '.join(losses) or 'none'}"
        yield _problem((*path, "of"), of, f"there is no loss {loss!r}", fix)


def _sections(root: Node, name: str) -> dict[str, Node]:
    section = root.child(name)
    return section.value if section is not None and isinstance(section.value, dict) else {}


def _problem(path: Path, node: Node, what: str, fix: str) -> Problem:
    at = node.key or node.at if isinstance(node.value, dict) else node.at
    return Problem(PenaltyMisdeclared.fault(what, fix=fix), at, dotted(path))
