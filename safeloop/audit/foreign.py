"""The watch over a loop that is not ours: what is heard on the tape and by hooks, and the checks that look at it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from safeloop.audit.gradients import GradientWatch
from safeloop.audit.journal import Journal, user_site
from safeloop.audit.lifetime import Lifetimes, holders_of_frames, holders_of_modules
from safeloop.audit.means import count_means
from safeloop.audit.shims import OptimizerHooks, ScalerShim, find_scalers, find_schedulers, position
from safeloop.audit.stretch import OpenTape, build_tape, is_compiled
from safeloop.autograd.survey import Survey
from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck, EventCheck
from safeloop.checks.events import Backward, Event, Iteration, LoopState, ScaleUpdate, Schedule, Unscale, Update
from safeloop.checks.graph.detached import PathCutByData
from safeloop.checks.graph.functions import CustomGradientWrong
from safeloop.checks.stages import call_checks, event_checks, gradient_faults, history_faults
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
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Mapping[str, Optimizer],
        handle: Handle,
        scalers: Iterable[GradScaler] | None = None,
        schedulers: Iterable[LRScheduler] | None = None,
    ) -> None:
        self._model = model
        self._handle = handle
        self._optimizers = optimizers
        self._parameters = _named(model, optimizers)
        self._names = {id(p): name for name, p in self._parameters.items()}
        self._events: list[EventCheck] = event_checks(model)
        self._by_data = PathCutByData()
        frozen = frozenset(id(p) for p in model.parameters() if not p.requires_grad)
        calls: list[CallCheck] = [*call_checks(model, frozen), self._by_data]
        both = [check for check in calls if isinstance(check, EventCheck)]
        self._events += both
        self.gradients = GradientWatch(model)
        self._lifetimes = Lifetimes(self._names)
        self.journal = Journal(self._parameters, optimizers, self._tell, self._surveyed)
        listeners = self.journal.listeners
        for name in ("cross_entropy", "nll_loss"):
            listeners.setdefault(name, []).append(count_means)
        self._open = OpenTape(build_tape(model, calls, handle, listeners))
        self._known_functions: set[type] = set()
        self.is_deep = False
        self._hooks = OptimizerHooks(optimizers, self._before_step, self._after_step)
        self._shims = [ScalerShim(s, self._scaler_told) for s in (find_scalers() if scalers is None else scalers)]
        found = find_schedulers(optimizers.values()) if schedulers is None else list(schedulers)
        self._schedulers = {id(s): (s, position(s)) for s in found}
        self._stepping: str | None = None
        self._did_step = False
        self._idle = set(optimizers)

    @property
    def tape_is_on(self) -> bool:
        """Whether calls of torch functions are recorded now."""
        return self._open.is_on

    def dive(self) -> None:
        """Look at the next iteration in depth."""
        if is_compiled(self._model):
            self.surface()
            return
        if not self.is_deep:
            self.journal.open()
        self._open.on()
        self.is_deep = True
        self._lifetimes.begin(self._open.tape.first_node)
        self.journal.since = self._open.tape.first_node

    def surface(self) -> None:
        """Leave the following iterations to hooks alone."""
        self._open.off()
        if self.is_deep:
            self.journal.close()
        self.is_deep = False

    def iterate(self) -> None:
        """One iteration of the loop is over."""
        self._poll_schedulers()
        self.journal.record(Iteration(None, self.journal.iteration))
        if self.is_deep and self.journal.iteration in _SCANS:
            self._scan()
        self.journal.iteration += 1

    def close(self) -> None:
        """Tell what only the end shows, and undo everything."""
        self.undo()
        self.journal.close()
        faults = [fault for check in self._events for fault in check.close(self.journal.state)]
        if self.gradients.history.steps >= 3:
            faults += history_faults(self.gradients.finish(), is_over=True)
        self._handle(faults)

    def undo(self) -> None:
        """Take every hook, shim and mode away."""
        self._open.off()
        self._hooks.remove()
        for shim in self._shims:
            shim.remove()

    def failed(self) -> list[Fault]:
        """What the watch knows of an error that ended the loop."""
        return list(self._lifetimes.suspicion())

    def first_window_over(self) -> None:
        """The steps that are all looked at are over: tell what they have shown of the gradients."""
        self._handle(history_faults(self.gradients.finish(), is_over=False))

    def _tell(self, event: Event, state: LoopState) -> None:
        if faults := [fault for check in self._events for fault in check.see(event, state)]:
            self._handle(faults)

    def _surveyed(self, event: Backward, roots: list[Tensor], found: Survey, call: Call) -> None:
        faults = list(self._lifetimes.reached(found, call.tape, event.site, self.journal.iteration))
        faults += self._by_data.visited(found.numbers)
        for kind, args in list(call.tape.functions.items()):
            if kind not in self._known_functions:
                self._known_functions.add(kind)
                faults += [fault] if (fault := CustomGradientWrong.of(kind, args)) is not None else []
        if not self.journal.state.inside:
            wanted = {n: p for n, p in self._parameters.items() if p.requires_grad and n in self.journal.state.owner_of}
            self.gradients.before(roots, call.tape, wanted)
        if faults:
            self._handle(faults)

    def _before_step(self, owner: str, optimizer: Optimizer, has_closure: bool) -> None:
        self._did_step = True
        self._poll_schedulers()
        event = self._update(owner, optimizer, has_closure=has_closure)
        if self.is_deep and not has_closure:
            self._look(owner, optimizer, event)
        self.journal.record(event)
        self.journal.state.inside = owner

    def _after_step(self, owner: str, optimizer: Optimizer) -> None:
        self.journal.stepped(owner)

    def _look(self, owner: str, optimizer: Optimizer, event: Update) -> None:
        mine = {name: p for name, p in self._parameters.items() if name in self.journal.state.owners[owner]}
        where = f"step {self.journal.iteration}, before {type(optimizer).__name__}.step() of `{owner}`"
        self.gradients.after(mine, self._open.tape, where)
        if any(self._is_bad(p) for p in mine.values()):
            self._handle(gradient_faults(GradientsView(mine, {}, self.journal.iteration, where)))

    @staticmethod
    def _is_bad(parameter: nn.Parameter) -> bool:
        if parameter.grad is None:
            return False
        values = parameter.grad._values() if parameter.grad.is_sparse else parameter.grad
        return not math.isfinite(float(values.detach().abs().float().norm()))

    def _update(self, owner: str, optimizer: Optimizer, *, has_closure: bool = False, skipped: bool = False) -> Update:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        names = self._names
        stale = frozenset(names[id(p)] for p in held if not p.requires_grad and p.grad is not None)
        zero: frozenset[str] = frozenset()
        bad: tuple[str, ...] = ()
        if self.is_deep and not has_closure:
            dense = [(names[id(p)], p.grad) for p in held if p.grad is not None and not p.grad.is_sparse]
            zero = frozenset(name for name, gradient in dense if not bool(gradient.any()))
        if skipped:
            bad = tuple(names[id(p)] for p in held if self._is_bad(p))
        return Update(
            user_site(),
            self.journal.iteration,
            owner,
            frozenset(names[id(p)] for p in held if p.grad is None),
            zero,
            tuple(float(group["lr"]) for group in optimizer.param_groups if "lr" in group),
            self._stepping == owner,
            has_closure,
            self.is_deep,
            frozenset(names[id(p)] for p in held if not p.requires_grad),
            stale,
            bad,
            skipped,
        )

    def _scaler_told(self, what: str, optimizer: Optimizer | None) -> None:
        owner = next((name for name, known in self._optimizers.items() if known is optimizer), None)
        iteration = self.journal.iteration
        if what == "update":
            self.journal.record(ScaleUpdate(user_site(), iteration))
        elif owner is None or optimizer is None:
            return
        elif what == "unscale":
            self.journal.record(Unscale(user_site(), iteration, owner))
        elif what == "before step":
            self._stepping, self._did_step = owner, False
        else:
            if not self._did_step:
                self.journal.record(self._update(owner, optimizer, skipped=True))
            self._stepping = None

    def _poll_schedulers(self) -> None:
        for key, (scheduler, before) in self._schedulers.items():
            now = position(scheduler)
            if now != before:
                self._schedulers[key] = (scheduler, now)
                optimizer = scheduler.optimizer
                owner = next((name for name, known in self._optimizers.items() if known is optimizer), "")
                called = bool(getattr(optimizer, "_opt_called", False))
                self.journal.record(Schedule(None, self.journal.iteration, owner, scheduler, called))

    def _scan(self) -> None:
        holders = [*holders_of_frames(sys._getframe(1)), *holders_of_modules(self._model)]
        self._handle(list(self._lifetimes.kept(holders)))


def _named(model: nn.Module, optimizers: Mapping[str, Optimizer]) -> dict[str, nn.Parameter]:
    """The parameters of the model by name, and what else the optimizers hold by its place there."""
    named: dict[str, Any] = dict(model.named_parameters())
    known = {id(p) for p in named.values()}
    for owner, optimizer in optimizers.items():
        for g, group in enumerate(optimizer.param_groups):
            for i, tensor in enumerate(group["params"]):
                if id(tensor) not in known:
                    known.add(id(tensor))
                    named[f"{owner}[{g}][{i}]"] = tensor
    return named
