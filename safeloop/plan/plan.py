"""A `StepPlan` is an ordered list of phases of nodes. One that is in the wrong order cannot be built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from safeloop.checks.update.order import StepOutOfOrder
from safeloop.faults import FaultError
from safeloop.plan import show
from safeloop.plan.closure import ClosureUpdate
from safeloop.plan.node import Fact, Node
from safeloop.plan.nodes import Backward, Forward, Update


@dataclass(frozen=True, slots=True)
class Phase:
    """A forward, its loss terms, the owners that it trains."""

    name: str
    nodes: tuple[Node, ...]
    trains: tuple[str, ...]
    repeat: int = 1
    every: int = 1
    """runs on the steps that this divides"""
    micro_batches: int = 1
    """forward and backward are run for so many micro-batches before the rest"""
    weight_by: str = "samples"
    frozen: tuple[str, ...] = ()
    """owners that the phase does not train: their parameters are frozen while it runs"""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What a step does, in order.

    Raises:
        FaultError: SL601, a node stands where something that it needs does not hold, or an owner is never updated.
    """

    phases: tuple[Phase, ...]
    closing: tuple[Node, ...] = ()
    """what follows all phases, once a step"""
    parameters: tuple[str, ...] = ()
    """lines on who owns what, for the printed plan"""

    def __post_init__(self) -> None:
        held: set[Fact] = set()
        for phase in self.phases:
            _refuse_between(phase)
            for turn in range(min(phase.repeat, 2)):
                held = _walk(f"phase `{phase.name}`", phase.nodes, held, turn)
            if never := [owner for owner in phase.trains if not _is_updated(phase, owner)]:
                raise StepOutOfOrder.error(
                    f"phase `{phase.name}` trains `{never[0]}`, but no `update` of it is planned",
                    where=f"phase `{phase.name}`",
                    fix=f"add its update after its backward and finite check, or leave `{never[0]}` out of `trains`",
                )
        _walk("end of the step", self.closing, held)

    def __str__(self) -> str:
        return show.text(self)

    def why(self) -> str:
        """The plan with the reason for each line."""
        return show.text(self, with_reasons=True)

    def json(self) -> str:
        """The plan as JSON: phases, nodes, and what each needs, gives and voids."""
        return show.json_text(self)


def _is_updated(phase: Phase, owner: str) -> bool:
    return any(isinstance(node, Update | ClosureUpdate) and node.owner == owner for node in phase.nodes)


def refuse_several(phase: Phase) -> None:
    """See that a phase that is to run has one forward and one backward, which is for all its owners.

    An order with several can be right, and a plan; the executor differentiates the terms of a phase together.

    Raises:
        FaultError: SL601, it has several.
    """
    verbs = [node.verb for node in phase.nodes if isinstance(node, Forward | Backward)]
    if several := next((verb for verb in verbs if verbs.count(verb) > 1), None):
        raise StepOutOfOrder.error(
            f"phase `{phase.name}` has {verbs.count(several)} nodes `{several}`; a phase has one, for all its owners",
            where=f"phase `{phase.name}`",
            why="the terms of a phase are differentiated together; what must be apart is a phase of its own",
            fix=f"put the other `{several}` into a phase of its own, or give its terms and owners to the first",
        )


def _refuse_between(phase: Phase) -> None:
    inner = [index for index, node in enumerate(phase.nodes) if isinstance(node, Forward | Backward)]
    if phase.micro_batches > 1 and inner and inner[-1] - inner[0] >= len(inner):
        between = next(node for node in phase.nodes[inner[0] :] if not isinstance(node, Forward | Backward))
        raise StepOutOfOrder.error(
            f"`{between.verb}` stands between forward and backward, and would be done for each micro-batch",
            where=f"phase `{phase.name}`, {phase.micro_batches} micro-batches for each update",
            why=between.why,
            fix=f"put `{between.verb}` before the forward or after the backward",
        )


def _walk(place: str, nodes: Sequence[Node], held: set[Fact], turn: int = 0) -> set[Fact]:
    """What holds after `nodes`, from what held before."""
    for index, node in enumerate(nodes):
        if missing := sorted(node.needs - held):
            raise _out_of_order(place, nodes, index, missing, turn)
        if isinstance(node, ClosureUpdate):
            _walk(f"{place}, each evaluation of `{node.owner}`", node.inner, held, turn)
        held = (held - node.voids) | node.gives
    return held


def _out_of_order(place: str, nodes: Sequence[Node], index: int, missing: list[Fact], turn: int) -> FaultError:
    node = nodes[index]
    givers = {other.verb for other in nodes for fact in missing if fact in other.gives}
    again = " in its second turn" if turn else ""
    lacking = "; ".join(map(str, missing))
    return StepOutOfOrder.error(
        f"`{node.verb}` stands where what it needs does not hold{again}; missing: {lacking}",
        where=f"{place}, node {index + 1} of {len(nodes)}: {node.verb} {node.subject}".rstrip(),
        why=node.why,
        fix=f"put {' and '.join(f'`{verb}`' for verb in sorted(givers))} between the last update and `{node.verb}`"
        if givers
        else f"take `{node.verb}` out of the plan, or add what gives it: {lacking}",
    )
