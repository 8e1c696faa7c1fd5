"""`Locator`: a region around any forward and backward, after which the birth of a bad tensor can be asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from types import FrameType, TracebackType

from torch import Tensor, nn

from safeloop.nonfinite.birth import Birth
from safeloop.nonfinite.calls import CallMap
from safeloop.nonfinite.modules import ModuleStack
from safeloop.nonfinite.reading import kind_of
from safeloop.nonfinite.taint import NONE, key_of
from safeloop.nonfinite.traps import explain
from safeloop.nonfinite.watch import BirthWatch


class Locator:
    """Finds the first operation at which a NaN or an infinity is born that reaches a tensor.

        with Locator(model) as locator:
            loss = compute(model, batch)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
        print(locator.cause(gradients))

    A dispatch mode sees every operation of forward and backward, a function mode which call made which autograd node,
    and hooks which module is running. All of it is gone on exit, after an exception too. Values, random state and
    gradients are bitwise as without it. Cost: about ten times the step, and a wait for the device at each operation.

    Args:
        model: names the modules, the parameters and the buffers.
        batch: path -> tensor of what the step is given (`batch["x"]`), to be named where it holds a NaN itself.
        top: a frame at which the search for the user's line stops; what stands above it only started the run.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        batch: Mapping[str, Tensor] | None = None,
        top: FrameType | None = None,
    ) -> None:
        given = {} if model is None else {f"buffer `{name}`": b for name, b in model.named_buffers()}
        given |= {} if model is None else {f"parameter `{name}`": p for name, p in model.named_parameters()}
        given |= batch or {}
        self._given = given  # also keeps them, and so their addresses, alive
        self._modules = ModuleStack(model)
        self._calls = CallMap(self._modules, top)
        self._watch = BirthWatch(self._modules, self._calls, {key_of(t): name for name, t in given.items()}, top)
        self._stack = ExitStack()

    def __enter__(self) -> Locator:
        with ExitStack() as stack:
            stack.enter_context(self._modules.watching())
            stack.enter_context(self._watch)
            stack.enter_context(self._calls)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def births(self) -> tuple[Birth, ...]:
        """Every birth so far, in order, also those that never reach anything."""
        return tuple(self._watch.births)

    def cause(
        self, tensors: Iterable[Tensor | None], terms: tuple[str, ...] = (), *, terms_are_finite: bool = False
    ) -> Birth | None:
        """The first birth that some of these tensors descend from; None where all are finite or nothing is known.

        Ask for the loss terms first, then for gradients: those of a bad term are bad in any case.

        Args:
            tensors: loss terms or gradients.
            terms: names of the loss terms concerned, which go into the birth.
            terms_are_finite: of gradients, whether the terms themselves are fine.
        """
        bad = [tensor for tensor in tensors if tensor is not None and kind_of(tensor) is not None]
        births = NONE.union(*(self._watch.taint.of(tensor) or NONE for tensor in bad))
        found = [self._watch.births[index] for index in sorted(births)]
        chosen = next((birth for birth in found if not birth.is_benign), found[0] if found else None)
        if chosen is None:
            return None
        chosen = replace(chosen, terms=terms, is_hidden=_is_hidden(chosen, found, terms_are_finite))
        return replace(chosen, explanation=explain(chosen))


def _is_hidden(birth: Birth, found: list[Birth], terms_are_finite: bool) -> bool:
    """Whether the gradient that arrives where the derivative is infinite is 0: the value itself was masked out."""
    if birth.phase == "forward":  # the value was bad, and all that came of it in the forward was hidden
        return terms_are_finite
    same = [other for other in found if other.node == birth.node and other.place == birth.place]
    return any(other.kind == "nan" and any(reading.num_zeros for reading in other.inputs) for other in same)
