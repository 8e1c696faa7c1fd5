"""The printed plan: for people (`text`) and for programs (`json_text`)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from safeloop.plan.node import Node
    from safeloop.plan.plan import Phase, StepPlan


def text(plan: StepPlan, *, with_reasons: bool = False) -> str:
    """One line for each node, with a note; with its reason below where asked."""
    lines: list[str] = []
    for phase in plan.phases:
        lines += [_head(phase), *_lines(phase.nodes, with_reasons)]
    if plan.closing:
        lines += ["end of the step", *_lines(plan.closing, with_reasons)]
    return "\n".join([*lines, *(["parameters", *(f"  {line}" for line in plan.parameters)] if plan.parameters else [])])


def json_text(plan: StepPlan) -> str:
    """Phases and nodes as JSON, two spaces deep."""
    phases = []
    for phase in plan.phases:
        names = (field.name for field in dataclasses.fields(phase) if field.name not in ("name", "nodes"))
        facts = {name: getattr(phase, name) for name in names}
        phases.append({"phase": phase.name, **facts, "nodes": [_node(node) for node in phase.nodes]})
    closing = [_node(node) for node in plan.closing]
    return json.dumps({"phases": phases, "closing": closing, "parameters": list(plan.parameters)}, indent=2)


def _head(phase: Phase) -> str:
    each = " each" if phase.repeat > 1 else ""
    if phase.micro_batches > 1:
        drawn = f"{phase.micro_batches} micro-batches{each}, weighted by {phase.weight_by}"
    else:
        drawn = "a fresh micro-batch each" if each else "one micro-batch"
    every = f", every {phase.every} steps" if phase.every > 1 else ""
    frozen = f"; {', '.join(phase.frozen)} frozen" if phase.frozen else ""
    return f"phase {phase.name} x{phase.repeat}   ({drawn}{every})   trains {', '.join(phase.trains)}{frozen}"


def _lines(nodes: Sequence[Node], with_reasons: bool) -> list[str]:
    lines = []
    verbs, subjects = _width(node.verb for node in nodes), _width(node.subject for node in nodes)
    for number, node in enumerate(nodes, 1):
        lines.append(f"  {number} {node.verb:<{verbs}}   {node.subject:<{subjects}}   {node.note}".rstrip())
        if with_reasons and node.why:
            lines.append(f"    {'':<{verbs}}   why: {node.why}")
    return lines


def _node(node: Node) -> dict[str, object]:
    return {
        "verb": node.verb,
        **dataclasses.asdict(node),
        "note": node.note,
        "why": node.why,
        "needs": sorted(map(str, node.needs)),
        "gives": sorted(map(str, node.gives)),
        "voids": sorted(map(str, node.voids)),
    }


def _width(texts: Iterable[str]) -> int:
    return max(map(len, texts), default=0)
