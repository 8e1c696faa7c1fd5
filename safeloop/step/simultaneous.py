"""Runs the passes of a simultaneous step: each term differentiated with respect to what it trains alone."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch

from safeloop.autograd.retain import retain_flags
from safeloop.autograd.walk import reach
from safeloop.checks.terms.simultaneous import TermReachesNothingItTrains, TermWithoutTrains
from safeloop.plan.simultaneous import SeparateBackward
from safeloop.step.exact import exact_norms
from safeloop.step.report import Frame

if TYPE_CHECKING:
    from safeloop.step.bind import Parts
    from safeloop.step.terms import TermRules


def bind_separate(
    node: SeparateBackward, parts: Parts, explain: Callable[[RuntimeError, str], None]
) -> Callable[[Frame], None]:
    """The operation of a separate backward: `retain_graph` is derived from the graph, step by step."""
    rules, scale = parts.readers[node.phase].rules, parts.precision.scale
    owned = {name: p for owner in node.owners for name, p in parts.owners[owner].parameters.items()}
    inputs = {
        term.name: [p for name, p in owned.items() if any(fnmatchcase(name, pattern) for pattern in patterns)]
        for term, patterns in zip(node.terms, node.trains, strict=True)
        if patterns
    }

    measure = None if parts.exact_every is None else exact_norms(inputs.__getitem__, parts.exact_every, scale)

    def backward(frame: Frame) -> None:
        if strangers := [name for name in frame.root_names if name not in inputs]:
            raise TermWithoutTrains.error(
                f"loss term `{strangers[0]}` declares no `trains`, and the step is simultaneous",
                where=rules.source,
                fix=f"set `{rules.section(strangers[0])}.trains` to the patterns of the parameters that it trains",
            )
        if frame.is_audited:
            _check_reach(frame, inputs, rules)
        seeds = frame.seeds if scale is None else scale.scaled(frame.seeds)
        flags = retain_flags(frame.roots, range(len(frame.roots)))
        try:
            if measure is not None:
                measure(frame, seeds)
            for name, seed, keeps in zip(frame.root_names, seeds, flags, strict=True):
                torch.autograd.backward(frame.roots.pop(0), seed, retain_graph=keeps, inputs=inputs[name])
        except RuntimeError as error:
            explain(error, rules.source)
            raise
        frame.roots, frame.seeds, frame.root_names = [], [], []

    return backward


def _check_reach(frame: Frame, inputs: dict[str, list[torch.nn.Parameter]], rules: TermRules) -> None:
    for name, root in zip(frame.root_names, frame.roots, strict=True):
        found = reach(root)
        if not found.is_complete:
            raise TermReachesNothingItTrains.error(
                f"the graph of loss term `{name}` runs through a re-entrant checkpoint, which cannot be confined",
                where=rules.source,
                fix="use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)",
            )
        if not any(parameter in found.leaves for parameter in inputs[name]):
            raise TermReachesNothingItTrains.error(
                f"loss term `{name}` reaches none of the {len(inputs[name])} parameters that it trains",
                where=rules.source,
                fix=f"correct `{rules.section(name)}.trains`, or look for a detach() between them and the term",
            )
