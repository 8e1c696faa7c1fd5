"""Guards the gradients of earlier micro-batches: while the user's function runs, nobody touches them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from safeloop.checks.update.guards import GradientsTouched
from safeloop.faults import Fault
from safeloop.plan import Backward, Forward, Node
from safeloop.step.report import Frame

if TYPE_CHECKING:
    from safeloop.step.bind import Observer, Operation


class WindowGuard:
    """Compares each `.grad` after a forward with what it was before: there or not, the same tensor, never written.

    A version counter tells a write: torch's in-place operations bump it. Cost: about 0.2 us for each parameter and
    micro-batch; without accumulation only audited steps are looked at, whose gradients must not be there yet.

    Args:
        parameters: name -> parameter, of what a phase trains.
        observer: where faults go.
        is_window: whether several micro-batches make an update.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], observer: Observer, *, is_window: bool) -> None:
        self._names = tuple(parameters)
        self._tensors = tuple(parameters.values())
        self._observer = observer
        self._is_window = is_window
        self._nothing: list[Tensor | None] = [None] * len(self._tensors)
        self.begin()

    def begin(self, frame: Frame | None = None) -> None:
        """A window begins: no gradient is there."""
        self._gradients = self._nothing
        self._versions: list[int] = []

    def keep(self, frame: Frame) -> None:
        """Remember the gradients as the backward pass left them."""
        self._gradients = [tensor.grad for tensor in self._tensors]
        self._versions = _versions(self._gradients)

    def look(self, frame: Frame) -> None:
        """See that they are as they were remembered."""
        if not (self._is_window or frame.is_audited):
            return
        now, known = [tensor.grad for tensor in self._tensors], self._gradients
        is_same = all(a is b for a, b in zip(now, known, strict=True))
        if not is_same or (self._versions and _versions(now) != self._versions):
            self._observer.faults([self._fault(now, frame)], frame.report.step)

    def around(self, nodes: Sequence[Node], operations: Sequence[Operation]) -> tuple[Operation, ...]:
        """Forwards and backwards with the guard between them."""
        guarded: list[Operation] = []
        for node, operation in zip(nodes, operations, strict=True):
            guarded.append(operation)
            if isinstance(node, Forward):
                guarded.append(self.look)
            elif isinstance(node, Backward) and self._is_window:
                guarded.append(self.keep)
        return tuple(guarded)

    def _fault(self, now: Sequence[Tensor | None], frame: Frame) -> Fault:
        lost, others = [], []
        versions = iter(self._versions)
        for name, new, old in zip(self._names, now, self._gradients, strict=True):
            version = None if old is None else next(versions)
            if new is None and old is not None:
                lost.append(name)
            elif new is not old or (new is not None and new._version != version):
                others.append(name)
        names = [*lost, *others]
        verb = "dropped" if not others else "changed"
        return GradientsTouched.fault(
            f"the loss function {verb} the gradients of {len(names)} of {len(now)} parameters (first: `{names[0]}`)",
            where=f"step {frame.report.step}, {frame.source}",
            why="the loop zeroes them before the first micro-batch of an update and then adds up; what is zeroed or "
            "added between is missing from the update, or counts twice",
            fix="take zero_grad(), backward() and whatever else writes `.grad` out of the loss function; for a "
            "gradient with respect to an input, use torch.autograd.grad",
            names=names,
        )


def _versions(gradients: Iterable[Tensor | None]) -> list[int]:
    return [gradient._version for gradient in gradients if gradient is not None]
