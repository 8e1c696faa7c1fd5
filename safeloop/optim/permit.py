"""Who may step an optimizer: while a run lasts, the loop alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer

from safeloop.checks.source import calling_place
from safeloop.checks.update.guards import StepOutsideThePlan
from safeloop.faults import Fault, FaultError


class Permit:
    """Steps one optimizer for the loop, and refuses everyone else while `held`.

    The hook is torch's own (`register_step_pre_hook`), is there only during a run, and is known to the direct path,
    which would not run beside hooks of others.
    """

    def __init__(self, name: str, optimizer: Optimizer) -> None:
        self.name = name
        self.optimizer = optimizer
        self.hook: int | None = None
        """the id of the hook, while it is there"""
        self._is_open = False

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Call the optimizer's `step()`."""
        self._is_open = True
        try:
            if closure is None:
                self.optimizer.step()
            else:
                self.optimizer.step(closure)
        finally:
            self._is_open = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Refuse every `step()` that is not the loop's.

        Raises:
            FaultError: SL618, from within that call, before a weight has changed.
        """
        handle = self.optimizer.register_step_pre_hook(self._refuse)
        self.hook = handle.id
        try:
            yield
        finally:
            self.hook = None
            handle.remove()

    def is_all_that_hooks(self, hooks: Any) -> bool:
        """Whether no hook but this one is among `hooks`, the optimizer's own."""
        return not hooks or (len(hooks) == 1 and self.hook in hooks)

    def _refuse(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._is_open:
            raise FaultError(_fault(self.name, optimizer))


def _fault(name: str, optimizer: Optimizer) -> Fault:
    return StepOutsideThePlan.fault(
        f"`step()` of `{name}` ({type(optimizer).__name__}) was called by other code than the loop",
        where=str(calling_place() or ""),
        why="the loop updates it when its gradients are complete, finite and clipped",
        fix="take the call out; for several updates in a step use a phase with `repeat`, or `ops.update` in a "
        "`custom_step`",
        names=(name,),
    )


@contextmanager
def held(permits: Iterable[Permit]) -> Iterator[None]:
    """Hold all of them."""
    rest = list(permits)
    if not rest:
        yield
        return
    with rest[0].held(), held(rest[1:]):
        yield
