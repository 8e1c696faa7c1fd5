"""The printed plan: for people (`text`) and for programs (`json_text`)."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safeloop.plan.nodes import Node
    from safeloop.plan.plan import Phase


def text(phases: Sequence[Phase], parameters: Sequence[str], *, with_reasons: bool = False) -> str:
    """One line for each node, with a note; with its reason below where asked."""
    lines: list[str] = []
    for phase in phases:
        fresh = "a fresh micro-batch each" if phase.repeat > 1 else "one micro-batch"
        lines.append(f"phase {phase.name} x{phase.repeat}   ({fresh})   trains {', '.join(phase.trains)}")
        verbs, subjects = _width(node.verb for node in phase.nodes), _width(node.subject for node in phase.nodes)
        for number, node in enumerate(phase.nodes, 1):
            lines.append(f"  {number} {node.verb:<{verbs}}   {node.subject:<{subjects}}   {node.note}".rstrip())
            if with_reasons and node.why:
                lines.append(f"    {'':<{verbs}}   why: {node.why}")
    return "\n".join([*lines, *(["parameters", *(f"  {line}" for line in parameters)] if parameters else [])])


def json_text(phases: Sequence[Phase], parameters: Sequence[str]) -> str:
    """Phases and nodes as JSON, two spaces deep."""
    tree = [
        {
            "phase": phase.name,
            "repeat": phase.repeat,
            "trains": list(phase.trains),
            "nodes": [_node(node) for node in phase.nodes],
        }
        for phase in phases
    ]
    return json.dumps({"phases": tree, "parameters": list(parameters)}, indent=2)


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


def _width(texts: object) -> int:
    return max(map(len, texts), default=0)  # type: ignore[call-overload]
