"""The watch over a loop that is not ours: what is heard on the tape and by hooks, and the checks that look at it."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from safeloop.audit.births import ForwardBirths
from safeloop.audit.gradients import ENOUGH_STEPS, GradientWatch
from safeloop.audit.guards import Guards
from safeloop.audit.hearing import Hearing
from safeloop.audit.journal import Journal, named_by_place
from safeloop.audit.lifetime import Lifetimes, globals_of_frames, holders_of_frames, holders_of_modules
from safeloop.audit.losses import loop_loss_checks
from safeloop.audit.masks import MaskWatch
from safeloop.audit.means import count_means
from safeloop.audit.scaling import ScalerWatch
from safeloop.audit.schedules import ScheduleWatch
from safeloop.audit.shims import OptimizerHooks
from safeloop.audit.stretch import OpenTape, build_tape, is_compiled
from safeloop.audit.updates import EVERY, Updates, are_bad
from safeloop.autograd.bad import BadTrace, Source
from safeloop.autograd.numbers import next_number
from safeloop.autograd.sites import user_site
from safeloop.autograd.survey import Survey
from safeloop.autograd.tape import Call, Tape, unheard
from safeloop.checks.check import CallCheck, EventCheck
from safeloop.checks.evaluation.aliases import KeptStateIsLive
from safeloop.checks.events import Backward, Event, Iteration, LoopState, Update
from safeloop.checks.gradients.nonfinite import NonFiniteGradient
from safeloop.checks.graph.detached import PathCutByData
from safeloop.checks.graph.discarded import FunctionResultDiscarded
from safeloop.checks.graph.functions import CustomGradientWrong
from safeloop.checks.graph.functions_twice import SecondDerivativeOfFunctionWrong
from safeloop.checks.penalties.unused import PenaltyNotInLoss
from safeloop.checks.source import at
from safeloop.checks.stages import call_checks, event_checks, gradient_faults, history_faults
from safeloop.checks.terms.unused import LossNeverUsed
from safeloop.checks.update.moved import MovedWithoutGradient
from safeloop.checks.update.rounded import UpdatesRoundAway
from safeloop.checks.views import GradientsView
from safeloop.faults import Fault

_SCANS = frozenset((5, 10, 19))
"""Iterations after which somebody who keeps graphs is looked for."""

Handle = Callable[[list[Fault]], None]


class LoopWatch:
    """Everything that is watched between the first and the last iteration.

    Args:
        model: the module that is trained.
        optimizers: by name.
        scalers: gradient scalers; None: those of the process.
        schedulers: learning-rate schedules; None: those of the process that move one of the optimizers, or another
            over the same parameters.
        handle: what becomes of faults.
        ask: has the next iteration looked at in depth.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Mapping[str, Optimizer],
        handle: Handle,
        ask: Callable[[], None],
        scalers: Iterable[GradScaler] | None = None,
        schedulers: Iterable[LRScheduler] | None = None,
    ) -> None:
        self._model = model
        self._handle = handle
        self._optimizers = optimizers
        self.journal = Journal(named_by_place(model, optimizers), optimizers, self._tell)
        self._parameters, self._names = self.journal.parameters, self.journal.names
        self._updates = Updates(self.journal, [model, *itertools.islice(model.children(), 3)], ask)
        self._events: list[EventCheck] = event_checks(model)
        self._visitors = (PathCutByData(), PenaltyNotInLoss(), LossNeverUsed())
        self._sums = loop_loss_checks()
        self._functions = (CustomGradientWrong(), SecondDerivativeOfFunctionWrong())
        self._discarded = FunctionResultDiscarded()
        frozen = frozenset(id(p) for p in model.parameters() if not p.requires_grad)
        calls: list[CallCheck] = [*call_checks(model, frozen), *self._visitors, *self._sums, *self._functions]
        both = [check for check in calls if isinstance(check, EventCheck)]
        self._events += both
        self.gradients = GradientWatch(model)
        self._lifetimes = Lifetimes(self._names)
        listeners = Hearing(self.journal, self._surveyed, lambda scaler: self._scalers.found(scaler)).listeners
        listeners |= {name: [*listeners.get(name, ()), count_means] for name in ("cross_entropy", "nll_loss")}
        self._open = OpenTape(build_tape(model, calls, handle, listeners))
        self._births = ForwardBirths(handle)
        self._open.tape.witness = self._births.look
        self._guards = Guards(model, self._parameters, self._open.tape.writes)
        self._moved = MovedWithoutGradient()
        self._rounded = UpdatesRoundAway(self._names)
        self._aliases = KeptStateIsLive(model)
        self._bad: BadTrace | None = None
        self._is_bad_told = False
        self.is_deep = False
        broken = self._open.tape.broken
        self._scalers = ScalerWatch(self.journal, self._updates, scalers, broken)
        self._masks = MaskWatch(optimizers, broken)
        self._hooks = OptimizerHooks(optimizers, self._before_step, self._after_step, broken)
        self._schedules = ScheduleWatch(self.journal, optimizers, schedulers)
        self._has_updated = True
        self._told_at = 0
        """the last iteration whose end the checks were told of"""
        self._is_hushed = False
        """a step of PyTorch's own runs, every operation of which need not be looked at"""

    @property
    def tape(self) -> Tape:
        """The record of calls, of the last iteration that was looked at in depth."""
        return self._open.tape

    @property
    def broken(self) -> list[Exception]:
        """Errors of our own, which the loop was not stopped for."""
        return self._open.tape.broken

    def dive(self) -> None:
        """Look at the next iteration in depth."""
        if is_compiled(self._model):
            self.surface()
            return
        if not self.is_deep:
            self.journal.open()
        self._open.on()
        self._guards.start()
        first = self._open.tape.first_node
        if not self.is_deep:
            owned = self.journal.state.owner_of or self._parameters
            self._lifetimes.updated([self._parameters[name] for name in owned], first)
        self.is_deep = True
        if self._has_updated or not self._optimizers:  # a graph is old when weights have changed since it was made
            self._has_updated = False
            self._lifetimes.begin(first)
            self.journal.since = first

    def surface(self) -> None:
        """Leave the following iterations to hooks alone."""
        self._open.off()
        self._guards.stop()
        if self.is_deep:
            self.journal.close()
        self.is_deep = False

    def iterate(self) -> None:
        """One iteration of the loop is over."""
        if not self.journal.iteration:
            self._schedules.find()
        self._schedules.poll(is_deep=self.is_deep)
        is_due = self.journal.iteration - self._told_at >= EVERY or not torch.is_grad_enabled()
        if self.is_deep or is_due:
            self._told_at = self.journal.iteration
            self.journal.record(Iteration(None, self.journal.iteration))
        if self.is_deep and self.journal.iteration in _SCANS:
            with unheard():
                self._scan()
        self.journal.iteration += 1

    def close(self) -> None:
        """Tell what only the end shows, and undo everything."""
        self.undo()
        self.journal.close()
        faults = [fault for check in self._events for fault in check.close(self.journal.state)]
        if self.gradients.history.steps >= ENOUGH_STEPS:
            faults += history_faults(self.gradients.finish(), is_over=True)
        self._handle(faults)

    def undo(self) -> None:
        """Take every hook, shim and mode away."""
        if self._bad is not None:
            self._bad.finish()
        self._open.off()
        self._guards.stop()
        self._masks.close()
        self._hooks.remove()
        self._scalers.remove()

    def failed(self) -> list[Fault]:
        """What the watch knows of an error that ended the loop."""
        return list(self._lifetimes.suspicion())

    def first_window_over(self) -> None:
        """The steps that are all looked at are over: tell what they have shown of the gradients."""
        self._handle(history_faults(self.gradients.finish(), is_over=False))

    def _tell(self, event: Event, state: LoopState) -> None:
        faults = [fault for check in self._events for fault in check.see(event, state)]
        if any(fault.code == NonFiniteGradient.code for fault in faults):
            self._is_bad_told = True  # the weights are bad from here on: what follows from that is no news
            self._open.tape.witness = None
        if faults:
            self._handle(faults)

    def _surveyed(self, event: Backward, roots: list[Tensor], found: Survey, call: Call) -> None:
        self._schedules.poll(is_deep=self.is_deep)
        faults = list(self._lifetimes.reached(found, call.tape, event.site, self.journal.iteration))
        faults += [fault for check in self._visitors for fault in check.visited(found.numbers)]
        faults += [fault for check in self._sums for fault in check.summed(roots)]
        faults += [fault for check in self._functions for fault in check.visited(found.numbers, call.tape.functions)]
        faults += self._discarded.visited(roots, call.tape)
        faults += self._guards.before_backward(roots, "", f"iteration {self.journal.iteration}")
        if not self.journal.state.inside:
            wanted = {n: p for n, p in self._parameters.items() if p.requires_grad and n in self.journal.state.owner_of}
            self.gradients.before(roots, call.tape, wanted)
            self._masks.before(wanted)
            if not self._is_bad_told and not event.is_scaled:
                self._bad = self._bad or BadTrace(roots)
        if faults:
            self._handle(faults)

    def _before_step(self, owner: str, optimizer: Optimizer, has_closure: bool) -> None:
        self._scalers.did_step = True
        if not self._updates.is_news(owner, optimizer) and not self.is_deep and not has_closure:
            self.journal.state.updates[owner] += 1
            return
        with unheard():
            self._tell_update(owner, optimizer, has_closure)
        if self.is_deep and not has_closure and self._hooks.are_innermost(optimizer):
            self._is_hushed = self._open.tape.is_deaf = True

    def _tell_update(self, owner: str, optimizer: Optimizer, has_closure: bool) -> None:
        self._schedules.poll(is_deep=self.is_deep)
        event = self._updates.event(owner, optimizer, is_deep=self.is_deep, has_closure=has_closure)
        is_taken = self.is_deep and not has_closure and not event.was_skipped
        if is_taken:
            self._moved.before(owner, optimizer, {name: self._parameters[name] for name in event.absent})
            self._rounded.before(owner, optimizer)
            self._look(owner, optimizer, event)
        self.journal.record(event)
        self.journal.state.inside = owner
        if is_taken and self._open.tape.witness is not None:
            self._births.updating(self._open.tape.parameters)
            if self._is_bad_told:
                self._open.tape.witness = None

    def _after_step(self, owner: str, optimizer: Optimizer) -> None:
        self._has_updated = True
        if not self.is_deep and not self.journal.state.inside:
            return
        self.journal.stepped(owner)
        if not self.is_deep:
            return
        with unheard():
            owned = [self._parameters[name] for name in self.journal.state.owners[owner]]
            if self._is_hushed:
                self._is_hushed = self._open.tape.is_deaf = False
                self._open.tape.wrote(owned)
            where = f"step of `{owner}`, iteration {self.journal.iteration}"
            rounded = self._rounded.after(owner, optimizer, user_site())
            self._handle([*self._moved.after(owner, optimizer, where), *rounded])
            self._lifetimes.updated(owned, next_number())

    def _look(self, owner: str, optimizer: Optimizer, event: Update) -> None:
        self._handle(self._guards.after_backward("", f"iteration {self.journal.iteration}"))
        mine = {name: p for name, p in self._parameters.items() if name in self.journal.state.owners[owner]}
        where = f"step {self.journal.iteration}, before {type(optimizer).__name__}.step() of `{owner}`"
        self.gradients.after(mine, self._open.tape, where)
        self._handle(self._masks.after(mine, self.journal, where))
        source = None if self._bad is None else self._bad.finish()
        self._bad = None
        if not self._is_bad_told and are_bad(mine.values()):
            self._is_bad_told = True
            found = gradient_faults(GradientsView(mine, {}, self.journal.iteration, where))
            self._handle([self._born(fault, source) for fault in found])

    def _born(self, fault: Fault, source: Source | None) -> Fault:
        """The fault with the user's line in whose derivative the value was born."""
        origin = None if source is None else self._open.tape.origin_of(source.number)
        if source is None or origin is None:
            return fault
        line = at(origin.site, origin.name)
        return replace(fault, where=f"{fault.where}; born in `{source.name}`, {line}")

    def _scan(self) -> None:
        frame = sys._getframe(1)
        holders = [*holders_of_frames(frame), *holders_of_modules(self._model), *globals_of_frames(frame)]
        faults = list(self._lifetimes.kept(holders))
        self._handle([*faults, *self._aliases.kept(holders_of_frames(frame, unless="save"))])
