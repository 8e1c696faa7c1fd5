"""What is kept of a turn so that it can be run again, and the seam through which the audit does so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor, nn

from safeloop.faults import Fault, FaultError
from safeloop.plan import Backward, Forward, Node
from safeloop.plan.simultaneous import SeparateBackward
from safeloop.step.buffers import BufferKeeper
from safeloop.step.precision import GradientScale
from safeloop.step.randomness import NOTHING_KEPT, RandomState

if TYPE_CHECKING:
    from safeloop.optim.owner import Owner
    from safeloop.step.bind import Operation, Parts
    from safeloop.step.report import Frame


@dataclass(frozen=True)
class Rerun:
    """How to run the forward and backward of a phase once more."""

    phase: str
    forward: Operation
    """fills a frame with roots, seeds and values, as in the step itself"""
    losses: Callable[[Any], Any]
    """the user's loss function"""
    owners: tuple[Owner, ...]
    """what the phase trains"""
    others: tuple[nn.Parameter, ...]
    """parameters that it does not train"""
    trains: dict[str, tuple[str, ...]]
    """simultaneous: loss term -> patterns of what it alone trains"""
    shares: Callable[[Sequence[Any]], list[float]]
    scale: GradientScale | None
    keeper: BufferKeeper | None = None
    """what holds the buffers of the turn's start, where the check comes before they are put back"""

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter, of all that the phase trains."""
        return {name: p for owner in self.owners for name, p in owner.parameters.items()}

    def trained_by(self, term: str) -> dict[str, nn.Parameter]:
        """Name -> parameter, of those whose gradient a term gives."""
        patterns = self.trains.get(term)
        return {
            name: parameter
            for name, parameter in self.parameters.items()
            if parameter.requires_grad and (patterns is None or any(fnmatchcase(name, p) for p in patterns))
        }

    def seeds(self, seeds: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the backward of the step begins with."""
        return seeds if self.scale is None else self.scale.scaled(seeds)


class Turn(NamedTuple):
    """A turn of a phase as it began: references to its micro-batches, and the random state. Weights are not copied.

    They need not be: a turn is looked at before its update.
    """

    rerun: Rerun
    window: Sequence[Any]
    random: RandomState


class Replayer(Protocol):
    """Keeps what a turn needs to be run again, and explains a refused one by doing so."""

    def capturing(self, rerun: Rerun) -> Operation:
        """What leaves in the frame, at the start of a turn, what a `Turn` is made of. No sync."""

    def ran(self, frame: Frame) -> None:
        """Forward and backward of a turn are over of which some random state was kept."""

    def explained(self, error: FaultError, frame: Frame) -> FaultError:
        """The error with the origin of what made the finite check refuse a turn."""

    def failed(self, error: Exception, frame: Frame) -> Exception:
        """The error, where it says more now, of a turn that ended in one before its gradients were looked at."""

    def skipped(self, frame: Frame) -> list[Fault]:
        """What to tell of a turn whose update was left out."""


def rerun_of(phase: str, nodes: Sequence[Node], parts: Parts, bind: Callable[[Node, Parts], Operation]) -> Rerun | None:
    """How to run a phase with these nodes again; None where it has no forward of its own (a custom step)."""
    forward = next((node for node in nodes if isinstance(node, Forward)), None)
    if forward is None:
        return None
    names = {name for node in nodes if isinstance(node, Backward) for name in node.owners}
    trained = {id(tensor) for name in names for tensor in parts.owners[name].tensors}
    separate = next((node for node in nodes if isinstance(node, SeparateBackward)), None)
    return Rerun(
        phase=phase,
        forward=bind(forward, parts),
        losses=parts.losses[forward.phase],
        owners=tuple(owner for name, owner in parts.owners.items() if name in names),
        others=tuple(p for owner in parts.owners.values() for p in owner.tensors if id(p) not in trained),
        trains={} if separate is None else {t.name: p for t, p in zip(separate.terms, separate.trains, strict=True)},
        shares=parts.shares,
        scale=parts.precision.scale,
    )


def capturing(parts: Parts, rerun: Rerun | None) -> tuple[Operation, ...]:
    """What stands at the start of a turn: nothing where nothing is to be replayed."""
    replayer = parts.replayer
    if replayer is None or rerun is None:
        return ()
    return (replayer.capturing(rerun),)


def failing(parts: Parts) -> Callable[[Exception, Frame], Exception]:
    """What becomes of an error that ends a turn: buffers are as before the turn, and the turn is saved."""
    replayer, keeper = parts.replayer, parts.keeper

    def failed(error: Exception, frame: Frame) -> Exception:
        if frame.gradients:  # the finite check has seen it, and says itself what is to be said
            return error
        if keeper is not None:
            keeper.restore(turns=1)
        return error if replayer is None else replayer.failed(error, frame)

    return failed


def explaining(finite: Operation, parts: Parts) -> Operation:
    """A finite check whose faults say where the value was born."""
    replayer, gate, observer = parts.replayer, parts.gate, parts.observer
    if replayer is None:
        return finite
    ran = replayer.ran

    def check(frame: Frame) -> None:
        if frame.random is not NOTHING_KEPT:
            ran(frame)
        try:
            finite(frame)
        except FaultError as error:
            refused, gate.refused = gate.refused, None
            if refused is None:
                raise
            raise replayer.explained(error, refused) from None
        if frame.is_skipped:
            observer.faults(replayer.skipped(frame), frame.report.step)

    return check
