"""Watches the steps of a Trainer: decides which are looked at in depth, and looks at them."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from safeloop.audit.budget import FIRST_STEPS, LATE, Budget
from safeloop.audit.gradients import ENOUGH_STEPS, GradientWatch
from safeloop.audit.guards import Guards
from safeloop.audit.ledger import FaultLedger
from safeloop.audit.lifetime import Lifetimes, holders_of_modules, vars_of
from safeloop.audit.losses import loss_checks
from safeloop.audit.masks import MaskWatch
from safeloop.audit.opened import methods_of
from safeloop.audit.stretch import build_tape, is_compiled, tell_broken
from safeloop.autograd.survey import survey
from safeloop.checks.evaluation.aliases import KeptStateIsLive
from safeloop.checks.evaluation.dropout import DropoutInEvaluation
from safeloop.checks.evaluation.modes import GradModeChangedInMetrics, GradModeLeftOff, ModeChangedInLoss, restless
from safeloop.checks.graph.detached import PathCutByData
from safeloop.checks.graph.discarded import FunctionResultDiscarded
from safeloop.checks.graph.functions import CustomGradientWrong
from safeloop.checks.graph.functions_twice import SecondDerivativeOfFunctionWrong
from safeloop.checks.penalties.unused import PenaltyNotInLoss
from safeloop.checks.setup.late_freezing import LateFreezing
from safeloop.checks.setup.ownership import ParameterAppearedLate
from safeloop.checks.source import Place, at, place_of
from safeloop.checks.stages import history_faults, trainer_call_checks
from safeloop.checks.update.unowned import GradientsForNobody
from safeloop.checks.views import Ownership, SetupView
from safeloop.faults import Fault
from safeloop.step.report import StepReport

_SCANS = frozenset((5, 10, 19))


@dataclass(frozen=True)
class TermEvidence:
    """What the tape has seen of the terms of one forward."""

    made: Mapping[str, Place]
    cuts: Mapping[str, str]


class StepAudit:
    """Watches the steps of a run: never changes a number, a random state or a mode.

    Args:
        budget: chooses the steps that are looked at in depth.
        ledger: where faults go.
        model: what is trained.
        ownership: who updated what when the run was set up.
        holders: objects of the user's, beside the modules, whose attributes may keep graphs: the Trainer.
        permitted: loss terms that may be constant.
        optimizers: owner -> its optimizer.
        are_separate: whether each term is differentiated by itself, with respect to what it trains alone.
    """

    def __init__(
        self,
        budget: Budget,
        ledger: FaultLedger,
        model: nn.Module,
        ownership: Ownership,
        holders: Sequence[object] = (),
        permitted: Collection[str] = (),
        optimizers: Mapping[str, Optimizer] = MappingProxyType({}),
        are_separate: bool = False,
    ) -> None:
        self.budget = budget
        self.next_look = sys.maxsize if budget.level == "off" else 0
        """the first step at which `wants` is to be asked, and `done` to be told; those before it are plain"""
        self.first = 0
        """the step of the run at which this watch begins: the first of a stage"""
        self._ledger = ledger
        self._model = model
        self._ownership = ownership
        self._holders = holders
        self._permitted = frozenset(permitted)
        self._known = _identities(model)
        self._found: list[Fault] = []
        self._gradients = GradientWatch(model)
        self._lifetimes = Lifetimes({id(p): name for name, p in model.named_parameters()})
        self._aliases = KeptStateIsLive(model)
        self._visitors = (PathCutByData(), PenaltyNotInLoss())
        self._sums = loss_checks(are_joint=not are_separate)
        self._functions = (CustomGradientWrong(), SecondDerivativeOfFunctionWrong())
        self._discarded = FunctionResultDiscarded()
        frozen = frozenset(id(p) for name, p in model.named_parameters() if name in ownership.frozen)
        checks = [*trainer_call_checks(model, frozen), *self._visitors, *self._sums, *self._functions]
        self._tape = build_tape(model, checks, self._found.extend)
        self._evaluation = build_tape(model, [DropoutInEvaluation()], self._found.extend)
        self._guards = Guards(model, dict(model.named_parameters()), self._tape.writes)
        self._masks = MaskWatch(optimizers, self._tape.broken)
        self._late_freezing = LateFreezing(model)
        self._starts: tuple[int, int] = (-1, 0)
        self._evaluations = 0
        self._is_deep = False
        self._structures: set[tuple[Any, ...]] = set()
        self._histories = [FIRST_STEPS, LATE]

    def wants(self, step: int) -> bool:
        """Whether this step, which begins now, is looked at in depth."""
        self._is_deep = self.budget.wants(step - self.first)
        return self._is_deep

    def done(self, report: StepReport, seconds: float) -> None:
        """A step is over, after so many seconds; one that differs from all before has the next one looked at."""
        step = report.step
        own = step - self.first
        self.budget.done(own, seconds, was_deep=self._is_deep)
        structure = (*report.terms, *report.num_gradients.values())
        if structure not in self._structures:
            self._structures.add(structure)
            if not self._is_deep:
                self.budget.ask()
        if self._is_deep and own in _SCANS:
            self._scan(step)
        if self._late_freezing.is_due(own):
            self.faults(self._late_freezing.look(SetupView(self._model, self._ownership), own), step)
        if self._histories and own + 1 >= self._histories[0]:
            del self._histories[0]
            self._tell_history(step, is_over=False)
        self._is_deep = False
        self.next_look = self.first + self.budget.after(own)

    def _scan(self, step: int) -> None:
        holders = [*holders_of_modules(self._model)]
        holders += [(f"self.{key}", held) for thing in self._holders for key, held in vars_of(thing).items()]
        methods = [named for thing in self._holders for named in methods_of(thing)]
        self.faults([*self._lifetimes.kept([*holders, *methods]), *self._aliases.kept(holders)], step)

    def finish(self, step: int) -> None:
        """The run is over: tell what only all of it shows."""
        self._masks.close()
        tell_broken([*self._tape.broken, *self._evaluation.broken])
        self._tell_history(step, is_over=True)

    def _tell_history(self, step: int, *, is_over: bool) -> None:
        if self._gradients.history.steps >= ENOUGH_STEPS:
            self.faults(history_faults(self._gradients.finish(), is_over=is_over), step)

    @contextmanager
    def looking(self, step: int, source: str) -> Iterator[None]:
        """The call of a loss function, on a step that `wants` chose."""
        modes = {name: module.training for name, module in restless(self._model).items()}
        grad_mode = torch.is_grad_enabled()
        if is_compiled(self._model):
            yield
        else:
            self._tape.begin()
            if self._starts[0] != step:
                self._starts = (step, self._tape.first_node)
                self._lifetimes.begin(self._tape.first_node)
            self._guards.start()
            try:
                with self._tape:
                    yield
            finally:
                self._guards.stop()
        if torch.is_grad_enabled() != grad_mode:
            torch.set_grad_enabled(grad_mode)
            self._found.append(GradModeLeftOff.of(source))
        now = {name: module.training for name, module in restless(self._model).items()}
        if changed := {name: mode for name, mode in now.items() if modes.get(name, mode) != mode}:
            self._found.append(ModeChangedInLoss.of(changed, source))

    @contextmanager
    def evaluating(self, source: str) -> Iterator[None]:
        """The call of `metrics`, defined at `source`, on one batch; the first ones are looked at."""
        if self.budget.level == "off":
            yield
            return
        self._evaluations += 1
        grad_mode = torch.is_grad_enabled()
        if self._evaluations > 2 or is_compiled(self._model):
            yield
        else:
            self._evaluation.begin()
            with self._evaluation:
                yield
        if torch.is_grad_enabled() != grad_mode:
            torch.set_grad_enabled(grad_mode)
            self._found.append(GradModeChangedInMetrics.of(source, is_on=not grad_mode))
        self._tell(0)

    def forwarded(self, step: int) -> None:
        """Find parameters that the forward created, and tell what was heard."""
        self._tell(step)
        now = _identities(self._model)
        if now == self._known:
            return
        known, self._known = self._known, now
        appeared = frozenset(now.keys() - known.keys())
        faults = list(ParameterAppearedLate.find(SetupView(self._model, self._ownership), appeared))
        owner_of = self._ownership.owner_of
        replaced = [name for name in now.keys() & known.keys() & owner_of.keys() if now[name] != known[name]]
        if replaced:
            faults.append(GradientsForNobody.replaced(sorted(replaced), owner_of[replaced[0]], f"before step {step}"))
        self._ledger.add(faults, step)

    def evidence(self, returned: Mapping[str, Any]) -> TermEvidence:
        """The line that made each term, and where its gradient path was cut."""
        made: dict[str, Place] = {}
        cuts: dict[str, str] = {}
        for name, term in returned.items():
            tensor = term[0] if isinstance(term, tuple) and term else term
            if not isinstance(tensor, Tensor):
                continue
            if (place := place_of(self._tape.site_of(tensor))) is not None:
                made[name] = place
            marks = [mark for mark in self._tape.marks_of(tensor) if mark.kind == "cut"]
            if marks and not tensor.requires_grad:
                cuts[name] = f"cut by {marks[0].reason} at {at(marks[0].site, 'an unknown line')}"
        return TermEvidence(made, cuts)

    def differentiating(
        self, step: int, roots: Mapping[str, Tensor], wanted: Mapping[str, nn.Parameter], source: str
    ) -> None:
        """Look at the graphs of the loss terms, before the backward pass."""
        tape, terms = self._tape, list(roots.values())
        found = survey(*terms, since=self._starts[1])
        faults = list(self._lifetimes.reached(found, tape, None, step))
        faults += [fault for check in self._visitors for fault in check.visited(found.numbers)]
        faults += [fault for check in self._sums for fault in check.summed(terms)]
        faults += [fault for check in self._functions for fault in check.visited(found.numbers, tape.functions)]
        faults += self._discarded.visited(terms, tape)
        history = self._gradients.history
        for name, term in roots.items():
            history.term_sites[name] = at(tape.site_of(term), source)
            if name not in self._permitted and history.terms_zero.get(name, 0) >= 0:
                is_zero = not bool(term.detach().any())
                history.terms_zero[name] = history.terms_zero.get(name, 0) + 1 if is_zero else -1
        self._gradients.before(terms, tape, wanted)
        self._masks.before(wanted)
        faults += self._guards.before_backward(terms, source, f"step {step}")
        self.faults(faults, step)

    def differentiated(self, step: int, parameters: Mapping[str, nn.Parameter], source: str) -> None:
        """Look at the gradients, before the update."""
        self.faults(self._guards.after_backward(source, f"step {step}"), step)
        self._gradients.after(parameters, self._tape, source)
        self.faults(self._masks.after(parameters, None, f"step {step}"), step)

    def failed(self) -> list[Fault]:
        """What is known of an error that a backward pass has raised."""
        return list(self._lifetimes.suspicion())

    def faults(self, faults: list[Fault], step: int) -> None:
        """Record warnings; raise `FaultError` where one is an error. After a new one the next step is looked at."""
        if faults:
            known = len(self._ledger.faults)
            self._ledger.add(faults, step)
            if len(self._ledger.faults) > known and not self._is_deep:
                self.budget.ask()
                self.next_look = 0

    def _tell(self, step: int) -> None:
        found, self._found[:] = list(self._found), []
        self.faults(found, step)


def _identities(model: nn.Module) -> dict[str, int]:
    return {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
