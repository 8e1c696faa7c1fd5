"""`safeloop.audit`: the same checks and codes around a loop that is not ours; undone on exit."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Literal, TypeVar

import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.hooks import RemovableHandle

from safeloop.audit.budget import FIRST_STEPS, LATE, Budget, Level
from safeloop.audit.crash import crash_faults
from safeloop.audit.foreign import LoopWatch
from safeloop.audit.ledger import FaultLedger
from safeloop.audit.shims import hookable, is_inner_step
from safeloop.audit.stray import StrayOptimizers
from safeloop.audit.stretch import tell_broken
from safeloop.audit.updates import glance_gap
from safeloop.checks.setup.optimizers import NothingToTrain
from safeloop.checks.stages import loop_setup_faults
from safeloop.checks.views import SetupView
from safeloop.faults import Fault, FaultError
from safeloop.optim.ownership import owned_by_identity

OnFault = Literal["warn", "raise", "collect"]
_T = TypeVar("_T")


class FaultWarning(UserWarning):
    """A fault that `safeloop.audit` found in someone else's loop, with `on_fault="warn"`."""


class Audit:
    """Watches a loop: owners and modules on entry, then what happens to gradients, modes and graphs.

    Every fault is found once; `.faults` holds them all. Nothing of the loop is changed, and all hooks are gone on exit.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, nn.Module],
        optimizers: Optimizer | Sequence[Optimizer] | Mapping[str, Optimizer] | None = None,
        *,
        scaler: GradScaler | Iterable[GradScaler] | None = None,
        scheduler: LRScheduler | Iterable[LRScheduler] | None = None,
        level: Level = "standard",
        budget: float | None = 0.01,
        on_fault: OnFault = "warn",
        accept: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.model = nn.ModuleDict(dict(model)) if isinstance(model, Mapping) else model
        self.optimizers = _named(optimizers)
        self._scalers = _several(scaler, GradScaler)
        self._schedulers = _several(scheduler, LRScheduler)
        self._budget = Budget(level, budget)
        self._on_fault = on_fault
        self._ledger = FaultLedger(accept)
        self._watch: LoopWatch | None = None
        self._tick: RemovableHandle | None = None
        self._step = 0
        self._quiet = 0
        """iterations that are only counted, until the next that is more"""
        self._is_counted = False
        self._started = 0, 0.0
        """an iteration, and when it began"""

    @property
    def faults(self) -> tuple[Fault, ...]:
        """Every fault so far, in the order of its first appearance."""
        return self._ledger.faults

    @property
    def extra_ms(self) -> float:
        """What an iteration that is looked at in depth costs more than a plain one, in milliseconds."""
        return self._budget.extra_ms

    def step(self) -> None:
        """Tell that one iteration of the loop is over; without it, iterations are counted by the optimizers' steps."""
        if not self._is_counted:
            self._is_counted = True
            self._step = 0  # the optimizer's first step has counted it already
            self._stop_counting()
        self._over()

    def __enter__(self) -> Audit:
        if self._budget.level == "off":
            return self
        ownership = owned_by_identity(self.model, self.optimizers)
        self._handle(loop_setup_faults(SetupView(self.model, ownership, self.optimizers)))
        self._watch = LoopWatch(self.model, self.optimizers, self._handle, self._ask, self._scalers, self._schedulers)
        last = next(filter(None, map(hookable, reversed(self.optimizers.values()))), None)
        if last is not None and not self._is_counted:
            self._tick = last.register_step_post_hook(lambda optimizer, *_: self._stepped(optimizer))
        known = [found for found in map(hookable, self.optimizers.values()) if found is not None]
        self._stray = StrayOptimizers(self.model, known, self._watch.journal.state, self._handle, self._watch.broken)
        self._watch.dive()
        self._started = self._step, time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        watch, self._watch = self._watch, None
        if watch is None:
            return
        self._stop_counting()
        self._stray.close()
        watch.undo()
        tell_broken(watch.broken)
        if error is None:
            watch.close()
        elif isinstance(error, Exception) and not isinstance(error, FaultError):
            faults = [*watch.failed(), *crash_faults(error, self.model, watch), *self._all_frozen()]
            self._record(faults)

    def _all_frozen(self) -> list[Fault]:
        """Behind an error: that nothing was left to train."""
        if not self.optimizers or any(p.requires_grad for p in self.model.parameters()):
            return []
        return list(NothingToTrain.find(SetupView(self.model, owned_by_identity(self.model, self.optimizers))))

    def _stepped(self, optimizer: Optimizer) -> None:
        """An optimizer has stepped; where nobody tells iterations, the last optimizer's step ends one."""
        if is_inner_step(optimizer):
            return
        if self._step:
            self._over()
        else:
            self._step = 1  # the first step may still be followed by a first `audit.step()`

    def _stop_counting(self) -> None:
        if self._tick is not None:
            self._tick.remove()
            self._tick = None

    def _over(self) -> None:
        watch = self._watch
        if watch is None:
            return
        if self._quiet and torch.is_grad_enabled():
            self._quiet -= 1
            self._step += 1
            watch.journal.iteration += 1
            return
        first, started = self._started
        seconds = (time.perf_counter() - started) / (self._step + 1 - first)
        self._budget.done(self._step, seconds, was_deep=watch.is_deep)
        try:
            watch.iterate()
        except FaultError:
            raise
        except Exception as error:  # our own bug must not end the loop
            watch.broken.append(error)
        self._step += 1
        if self._step in (FIRST_STEPS, LATE) and self._budget.level == "standard":
            watch.first_window_over()
            self._stray.close()
        if self._budget.wants(self._step):
            watch.dive()
        else:
            if watch.is_deep:
                watch.surface()
            gap = glance_gap(self._step)
            self._quiet = gap - 1 - self._step % gap
        self._started = self._step, time.perf_counter()

    def _ask(self) -> None:
        """Something is new: have the next iteration looked at, where this one is not."""
        if self._watch is not None and not self._watch.is_deep:
            self._budget.ask()
            self._quiet = 0

    def _handle(self, faults: list[Fault]) -> None:
        known = set(self._ledger.faults)
        try:
            self._ledger.add(faults, self._step)
        except FaultError:
            if self._on_fault == "raise":
                raise
        if len(self._ledger.faults) > len(known):
            self._ask()
        self._warn(known)

    def _record(self, faults: list[Fault]) -> None:
        """Record faults while an error is on its way: nothing else is raised over it."""
        known = set(self._ledger.faults)
        if faults:
            self._ledger.raised(FaultError(faults[0], faults[1:]), self._step)
        self._warn(known)

    def _warn(self, known: set[Fault]) -> None:
        if self._on_fault == "warn":
            for fault in self._ledger.faults:
                if fault not in known:
                    warnings.warn(str(fault), FaultWarning, stacklevel=4)


def audit(
    model: nn.Module | Mapping[str, nn.Module],
    optimizers: Optimizer | Sequence[Optimizer] | Mapping[str, Optimizer] | None = None,
    *,
    scaler: GradScaler | Iterable[GradScaler] | None = None,
    scheduler: LRScheduler | Iterable[LRScheduler] | None = None,
    level: Level = "standard",
    budget: float | None = 0.01,
    on_fault: OnFault = "warn",
    accept: Mapping[str, Sequence[str]] | None = None,
) -> Audit:
    """Watch any training loop and name its gradient bugs: `with sl.audit(model=model, optimizers=optimizer): ...`.

    Args:
        model: the module that is trained, or several by name.
        optimizers: one, several, or several by name; without any, only the model is watched.
        scaler: gradient scalers; without, those of the process are found.
        scheduler: learning-rate schedules; without, those of the process that move these parameters are found.
        level: `off`, `standard` (the first 20 iterations in depth, later ones as `budget` allows) or `full` (every
            one).
        budget: the share of an iteration's time that deep checks may cost after the first 20; None: all iterations.
        on_fault: `warn` with a `FaultWarning`, `raise` a `FaultError`, or only `collect` in `.faults`.
        accept: code -> name patterns of faults that are meant to be there.
    """
    return Audit(
        model,
        optimizers,
        scaler=scaler,
        scheduler=scheduler,
        level=level,
        budget=budget,
        on_fault=on_fault,
        accept=accept,
    )


def _named(optimizers: Optimizer | Sequence[Optimizer] | Mapping[str, Optimizer] | None) -> dict[str, Optimizer]:
    if optimizers is None:
        return {}
    if isinstance(optimizers, Optimizer):
        return {"main": optimizers}
    if isinstance(optimizers, Mapping):
        return dict(optimizers)
    return {f"optimizer{index}": optimizer for index, optimizer in enumerate(optimizers)}


def _several(given: _T | Iterable[_T] | None, kind: type[_T]) -> list[_T] | None:
    if given is None:
        return None
    return [given] if isinstance(given, kind) else [one for one in given if isinstance(one, kind)]  # type: ignore[union-attr]
