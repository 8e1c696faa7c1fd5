"""A `StepPlan` is an ordered list of phases of nodes. One that is in the wrong order cannot be built."""

from __future__ import annotations

from dataclasses import dataclass

from safeloop.checks.update.order import StepOutOfOrder
from safeloop.faults import FaultError
from safeloop.plan import show
from safeloop.plan.nodes import Fact, Node, Update


@dataclass(frozen=True, slots=True)
class Phase:
    """A forward, its loss terms, the owners that it trains."""

    name: str
    nodes: tuple[Node, ...]
    trains: tuple[str, ...]
    repeat: int = 1


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What a step does, in order.

    Raises:
        FaultError: SL601, a node stands where something that it needs does not hold, or an owner is never updated.
    """

    phases: tuple[Phase, ...]
    parameters: tuple[str, ...] = ()
    """lines on who owns what, for the printed plan"""

    def __post_init__(self) -> None:
        held: set[Fact] = set()
        for phase in self.phases:
            for turn in range(min(phase.repeat, 2)):
                for index, node in enumerate(phase.nodes):
                    if missing := sorted(node.needs - held):
                        raise _out_of_order(phase, index, missing, turn)
                    held = (held - node.voids) | node.gives
            if never := [owner for owner in phase.trains if not _is_updated(phase, owner)]:
                raise StepOutOfOrder.error(
                    f"phase `{phase.name}` trains `{never[0]}`, but no `update` of it is planned",
                    where=f"phase `{phase.name}`",
                    fix=f"add its update after its backward and finite check, or leave `{never[0]}` out of `trains`",
                )

    def __str__(self) -> str:
        return show.text(self.phases, self.parameters)

    def why(self) -> str:
        """The plan with the reason for each line."""
        return show.text(self.phases, self.parameters, with_reasons=True)

    def json(self) -> str:
        """The plan as JSON: phases, nodes, and what each needs, gives and voids."""
        return show.json_text(self.phases, self.parameters)


def _is_updated(phase: Phase, owner: str) -> bool:
    return any(isinstance(node, Update) and node.owner == owner for node in phase.nodes)


def _out_of_order(phase: Phase, index: int, missing: list[Fact], turn: int) -> FaultError:
    node = phase.nodes[index]
    givers = {other.verb for other in phase.nodes for fact in missing if fact in other.gives}
    again = " in its second repeat" if turn else ""
    return StepOutOfOrder.error(
        f"`{node.verb}` stands where what it needs does not hold{again}; missing: {'; '.join(map(str, missing))}",
        where=f"phase `{phase.name}`, node {index + 1} of {len(phase.nodes)}: {node.verb} {node.subject}".rstrip(),
        why=node.why,
        fix=f"put {' and '.join(f'`{verb}`' for verb in sorted(givers))} between the last update and `{node.verb}`"
        if givers
        else f"take `{node.verb}` out of the plan, or add what gives it: {'; '.join(map(str, missing))}",
    )
