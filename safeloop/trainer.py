"""The Trainer: declare what is trained by which loss; the loop itself is `Trainer._loop`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from safeloop.accumulation import AccumulationReport, compare_accumulation
from safeloop.assembly import Assembly, probe, redraft_plan
from safeloop.audit.ledger import FaultLedger
from safeloop.bring import bring
from safeloop.bundles import saver
from safeloop.checks.config.run import LossAndLosses, NoLoss
from safeloop.checks.config.target import TargetOfWrongClass
from safeloop.checks.source import where_defined
from safeloop.checks.update.custom import CustomStepRefused
from safeloop.config import Loaded, load
from safeloop.curvature import CurvatureReadings
from safeloop.data.count import count
from safeloop.data.move import resolve_device
from safeloop.data.source import Source
from safeloop.declared import declared_losses, declared_metrics
from safeloop.drafting import wants_several_passes
from safeloop.evaluation import enter_training, preserved
from safeloop.evaluator import Evaluator
from safeloop.faults import Fault, FaultError
from safeloop.first_batch import check_terms
from safeloop.ingredients import Ingredients, PhaseMethod
from safeloop.methods import phase_methods
from safeloop.optim.permit import held
from safeloop.outcome import RunResult, outcome_of
from safeloop.penalties.points import is_due, leaf
from safeloop.penalties.request import Request, requested
from safeloop.phases import phases_of
from safeloop.plan import Node, StepPlan
from safeloop.plan.stages import StagedPlan
from safeloop.recorder import Recorder
from safeloop.seeds import seed_everything
from safeloop.staging import Stage, assemble_stages, run_plan
from safeloop.step import run_step
from safeloop.step.compiling import compile_model
from safeloop.step.custom import Operations, custom_plan, refuse_accumulation
from safeloop.stream import DataEnded


class Trainer:
    """Trains a model by a declared plan: override `loss` or `losses`, and `metrics`; sections configure the rest.

    Args:
        config: a YAML file, or what `safeloop.config.load` made of one.
        model: a module, used as it is; or the config section.
        data: a Dataset (a loader is built), a DataLoader or any iterable of ready micro-batches; or the config section,
            whose `train` and `eval` may be such objects too.
        eval_data: the same for evaluation.
        optimizers: one spec, several by name, or ready `torch.optim` objects, which are never edited.
        overrides: `a.b=c` strings, as on the command line.
        allow_modules: further module prefixes that `target:` may name.
        sections: any other section of the config (`run`, `losses`, ...) as a dict or a model; wins over the file.

    Raises:
        ConfigError: SL1, all mistakes of the config at once.
    """

    def __init__(
        self,
        config: str | Path | Loaded | None = None,
        *,
        model: nn.Module | Mapping[str, Any] | None = None,
        data: Any = None,
        eval_data: Any = None,
        optimizers: Optimizer | Mapping[str, Any] | None = None,
        overrides: Sequence[str] = (),
        allow_modules: Sequence[str] = (),
        **sections: Any,
    ) -> None:
        marks = phases_of(type(self))
        written = [n for n in ("loss", "losses", "custom_step") if self._overrides(n)] + list(marks)[:1]
        if len(written) > 1:
            raise LossAndLosses.error(
                f"{type(self).__name__} defines both `{written[0]}` and `{written[1]}`",
                where=where_defined(getattr(type(self), written[1])),
                fix="keep one: `loss` for a single term, `losses` for a dict of terms, `@phase` methods for phases",
            )
        self._is_custom = written == ["custom_step"]
        brought, sections = bring(model=model, data=data, eval_data=eval_data, optimizers=optimizers, sections=sections)
        given = {*brought.names, "trainer", *(["losses"] if written else [])}
        self.loaded = (
            config
            if isinstance(config, Loaded)
            else load(config, sections=sections, overrides=overrides, allow_modules=allow_modules, given=given)
        )
        self.config = self.loaded.config
        if not written and not any(section.is_built for section in self.config.losses.values()):
            raise self._no_loss()
        self.step = 0
        self._ledger = FaultLedger(self.config.audit.accept)
        self._ledger.add(self.loaded.warnings)
        self.device = resolve_device(self.config.run.device)
        self._brought = brought
        if brought.model is None:
            seed_everything(self.config.run.seed)
        self.model: nn.Module = brought.build_model(self.loaded)
        self._train_data = brought.train_source(self.loaded)
        self._losses = None if written else declared_losses(self.loaded, lambda: self.model, self.device, self.leaf)
        self._metrics = declared_metrics(self.loaded, lambda: self.model, self.device)
        self._evaluator = self._make_evaluator(brought.eval_source(self.loaded))
        if self._is_custom:
            refuse_accumulation(self.config.accumulate.micro_batches)
        self._assembly: Assembly | None = None
        self._stages: tuple[Stage, ...] = ()
        self._curvature: CurvatureReadings | None = None
        self._evaluated: tuple[int, dict[str, float]] = (-1, {})
        self._record: list[Node] | None = None
        self._phase = ""

    @property
    def faults(self) -> tuple[Fault, ...]:
        """Every fault so far, each once."""
        return self._ledger.faults

    @property
    def epoch(self) -> int:
        """The epoch that the next micro-batch belongs to, counted from 0."""
        return 0 if self._assembly is None else self._assembly.stream.epoch

    @property
    def averaged_model(self) -> nn.Module | None:
        """The model with averaged weights, which evaluations see as `self.model`; None before the first average."""
        average = None if self._assembly is None else self._assembly.average
        return None if average is None or not average.num_averaged else average.model

    def loss(self, batch: Any) -> Tensor:
        """The loss of one micro-batch: a 0-d tensor with a path to what it trains. Override this or `losses`."""
        raise self._no_loss()

    def losses(self, batch: Any) -> Mapping[str, Tensor | tuple[Tensor, Tensor] | Request]:
        """The loss terms of one micro-batch by name: a 0-d tensor, `(tensor, weights)` of one shape, or a penalty."""
        return {"loss": self.loss(batch)} if self._losses is None else self._losses(batch)

    def custom_step(self, ops: Operations, batch: Any) -> None:
        """A step by hand, for what no plan can say: in place of `loss`, `losses` and phases.

        `ops.zero`, `ops.backward`, `ops.update` and `ops.draw` are recorded and obey the rules of a plan; schedules and
        the gradient scale follow at the end of the step.
        """
        raise self._no_loss()

    def leaf(self, x: Tensor) -> Tensor:
        """`x` as a leaf that requires grad, on steps when a penalty of the phase is due; else `x` as it is.

        Run the model on what it returns, and give that as `at` to `self.penalty(of=..., at=x)`: the penalty then shares
        the loss's forward. What requires grad already is returned as it is, graph included. On a due step the backward
        pass also computes the gradient of `x`.
        """
        if not torch.is_grad_enabled() or not is_due(self.step, self._penalty_steps()):
            return x
        return leaf(x)

    def penalty(
        self,
        function: Callable[[Tensor], Any] | None = None,
        *,
        at: Tensor,
        of: Any = None,
        targets: Tensor | None = None,
    ) -> Request:
        """A penalty on the gradient of a function at some inputs; return it as a loss term.

        Its key among the terms is its name, and `penalties.<name>` of the config says which penalty it is, its weight
        and when it is due. It is computed only then, after the loss function, with autocast off; its derivative is
        part of the one backward pass of its phase.

        Args:
            function: called with `at`, gives the values that are differentiated, `[N, ...]`.
            at: the inputs, `[N, ...]`; a function is called with them as constants, so that no gradient leaves through
                them.
            of: in place of `function`: values that were computed from `at = self.leaf(...)`.
            targets: for penalties that compare the gradient with something.

        Raises:
            ValueError: neither or both of `function` and `of` are given.
        """
        return requested(function, at, of, targets, sys._getframe(1))

    def metrics(self, batch: Any) -> Mapping[str, Any]:
        """What is measured on one evaluation micro-batch, by name, without gradients and in eval mode.

        A tensor with a dimension is pooled element by element, a 0-d value is weighted by `count(batch)`, an object
        with `update`, `compute` and `reset` is used as it is.
        """
        return self._metrics(batch)

    def watch(self, name: str, tensor: Tensor) -> Tensor:
        """Log the norm of a loss's gradient at a tensor of the forward, as `watch/<name>`; call it in a loss function.

        Only on the steps that log is a hook set; it holds no tensor and goes with the graph. Several tensors of one
        name count as one vector.

        Returns:
            The tensor, as it was given.
        """
        if self._assembly is not None:
            self._assembly.watch.tensor(name, tensor)
        return tensor

    def count(self, batch: Any) -> int:
        """How many samples a micro-batch holds: the leading dimension of its first tensor."""
        return count(batch)

    def count_tokens(self, batch: Any) -> int:
        """How many tokens a micro-batch holds; override it for `accumulate.weight_by: tokens`."""
        return self.count(batch)

    def plan(self) -> StepPlan | StagedPlan:
        """The plan, after the set-up and one forward on the first micro-batch; nothing is trained."""
        returned = self._check()
        assembly, plan = self._assembled(), run_plan(self._stages)
        if isinstance(plan, StagedPlan):
            return plan
        if self._record is not None:
            return custom_plan(plan, tuple(assembly.owners), self._record)
        return redraft_plan(self._ingredients(), assembly, returned)

    def check(self) -> list[Fault]:
        """Set up, run one forward on the first micro-batch, and check its terms; nothing is trained.

        Raises:
            FaultError: the first error, with all others.
        """
        self._check()
        return list(self.faults)

    def check_accumulation(self) -> AccumulationReport:
        """Compare the gradients of the first window with those of one big batch; nothing is trained.

        A difference is a fault of the report, and of `faults`; what `audit.accept` accepts is none.

        Raises:
            FaultError: SL614, there is nothing to compare; or what `check` raises.
        """
        self.check()
        report = compare_accumulation(self._ingredients(), self._assembled())
        faults = tuple(fault for fault in report.faults if not self._ledger.accepts(fault))
        if faults:
            self._ledger.raised(FaultError(faults[0], faults[1:]), self.step)
        return replace(report, faults=faults)

    def fit(self) -> RunResult:
        """Train as the config says.

        Raises:
            FaultError: before any parameter has been changed by what the fault is about.
        """
        started = time.perf_counter()
        assembly = self._assembled()
        if (backend := self.config.run.compile_backend) is not None:
            again = wants_several_passes(self.config) or self._is_custom
            compile_model(self.model, backend, lambda: self._probe(assembly), keeps_buffers=again)
        seed_everything(self.config.run.seed)
        if self.config.log.curvature is not None:
            self._curvature = CurvatureReadings(self._ingredients(), assembly.stream.peek(), self._ledger)
        recorder = Recorder(self.loaded, self._stages, self.model, self._ledger)
        if recorder.dir is not None and self.config.nonfinite.save_bundle:
            self._save_bundles(recorder.dir)
        outcome = "failed"
        try:
            with held(owner.permit for stage in self._stages for owner in stage.assembly.owners.values()):
                outcome = self._train(recorder)
        except FaultError as error:
            self._ledger.raised(error, self.step)
            raise
        except KeyboardInterrupt:
            outcome = "interrupted"
            raise
        finally:
            with suppress(FaultError):  # what ended the run is on its way to the user already
                self._assembled().gate.finish()
            recorder.close(outcome, self.step)
        losses = {tag.removeprefix("loss/"): v for tag, v in recorder.last.items() if tag.startswith("loss/")}
        seconds = time.perf_counter() - started
        metrics = self._evaluated[1]
        return RunResult(self.step, self.epoch, metrics, losses, self.faults, recorder.dir, outcome, seconds)

    def _save_bundles(self, folder: Path) -> None:
        """Have a failing step saved, with the names of what only this program can give again."""
        needs = tuple(sorted(self._brought.names & {"model", "optimizers"}))
        if self.config.trainer is None and type(self) is not Trainer:
            needs = ("trainer", *needs)
        for stage in self._stages:
            if stage.assembly.replayer is not None:
                stage.assembly.replayer.save = saver(folder / "bundles", self.model, self.loaded.text, needs)

    def _check(self) -> dict[str, tuple[str, ...]]:
        """Check the terms of the first micro-batch; the names that each phase returned."""
        assembly = self._assembled()
        return check_terms(assembly, lambda read: self._probe(assembly, read), self._ledger)

    def _train(self, recorder: Recorder) -> str:
        """One stage after the other, and a last evaluation; how it ended."""
        for stage in self._stages:
            self._assembly = stage.assembly
            stage.begin()
            recorder.enter(stage)
            if not self._loop(stage.assembly, stage.end, recorder):
                break
            if stage is not self._stages[-1]:
                stage.let_go()
        if self._evaluator is not None and self._evaluated[0] != self.step:
            self._evaluated = self.step, self._evaluator(self._assembled(), recorder)
        return outcome_of(self.config, self.step, self._ledger, has_averaged=self.averaged_model is not None)

    def _loop(self, run: Assembly, end: int | None, recorder: Recorder) -> bool:
        """The steps of a stage; False where the data ended before it."""
        every, evaluator, evaluate_every = self.config.log.every, self._evaluator, self.config.evaluate.every
        program, stream, readings, curvature = run.program, run.stream, recorder.readings, self._curvature
        is_whole = True
        readings.resume(stream.num_samples)
        while end is None or self.step < end:
            is_due = (self.step + 1) % every == 0 or self.step + 1 == end
            try:
                report = run_step(program, stream, self.step, wants_modules=is_due)
            except DataEnded:
                is_whole = False
                break
            readings.add(report)
            self.step += 1
            wants_metrics = evaluator and evaluate_every and self.step % evaluate_every == 0
            if not is_due and not wants_metrics:
                recorder.progress(self.step)
                continue
            readings.pause(stream.num_samples)
            if is_due:
                recorder.log(report, stream.epoch, curvature.at(self.step, run) if curvature else {})
            if evaluator is not None and wants_metrics:
                self._evaluated = self.step, evaluator(run, recorder)
            readings.resume(stream.num_samples)
        try:
            run.gate.finish()
        except FaultError as error:
            if run.keeper is not None:
                run.keeper.restore(turns=1)
            refused = run.gate.refused
            if run.replayer is None or refused is None:
                raise
            raise run.replayer.explained(error, refused) from None
        run.audit.finish(self.step)
        return is_whole

    def _penalty_steps(self) -> list[int]:
        """Every how many steps the penalties of the running phase are due; all of them until they have come once."""
        penalties, assembly = self.config.penalties, self._assembly
        reader = None if assembly is None else assembly.readers.get(self._phase)
        names = penalties if reader is None or not reader.penalties.names else reader.penalties.names
        return [penalties[name].every for name in names if name in penalties]

    def _entering(self, phase: str) -> Callable[[Any], Any]:
        """The method of a phase, which makes it known as the running one."""
        method = getattr(self, phase)

        def losses(batch: Any) -> Any:
            self._phase = phase
            return method(batch)

        return losses

    def _all_losses(self, batch: Any) -> dict[str, Any]:
        return {name: term for phase in self._phases() for name, term in phase.losses(batch).items()}

    def _assembled(self) -> Assembly:
        if self._assembly is None:
            enter_training(self.model)
            self.model.to(self.device)
            self._stages = assemble_stages(self._ingredients(), self.device, self._ledger)
            self._assembly = self._stages[0].assembly
        return self._assembly

    def _no_loss(self) -> FaultError:
        return NoLoss.error(
            f"{type(self).__name__} defines no loss",
            fix="override `loss` or `losses`, or declare `losses:` with `type` and `inputs`",
        )

    def _ingredients(self) -> Ingredients:
        return Ingredients(
            loaded=self.loaded,
            model=self.model,
            data=self._train_data,
            phases=self._phases(),
            count=self.count,
            count_tokens=self.count_tokens if self._overrides("count_tokens") else None,
            optimizers=self._brought.optimizers,
            custom=self.custom_step if self._is_custom else None,
            holders=(self,),
        )

    def _probe(
        self, assembly: Assembly, read: Callable[[str, Any], Any] = lambda phase, returned: returned
    ) -> Mapping[str, Any]:
        """What `read` makes of what each phase returns for the first micro-batch; a custom step is only rehearsed."""
        if assembly.program.custom is None:
            return probe(self._ingredients(), assembly.stream, read)
        with preserved(self.model), torch.enable_grad():
            self._record = assembly.program.custom.rehearse(assembly.stream.peek(), self.model)
        return {}

    def _no_terms(self, batch: Any) -> Mapping[str, Any]:
        raise CustomStepRefused.error(
            "a custom step has no loss function that could be called apart from it",
            where=where_defined(type(self).custom_step),
            fix="give lazy parameters their shapes by one call of the model before, and leave `evaluate.loss` off",
        )

    def _phases(self) -> list[PhaseMethod]:
        if self._is_custom:
            source = where_defined(type(self).custom_step)
            return [PhaseMethod("custom_step", self._no_terms, source, list(self.config.losses), True)]
        return phase_methods(self, self._losses, is_single=self._overrides("loss"))

    def _make_evaluator(self, data: Source | None) -> Evaluator | None:
        if data is None:
            return None
        has_metrics = self._overrides("metrics") or bool(self._metrics.functions)
        wants_loss = self.config.evaluate.loss
        watched = {getattr(spec.scheduler, "metric", None) for spec in self.config.all_optimizers}
        if wants_loss is None:
            wants_loss = not self._is_custom and (not has_metrics or "loss/eval" in watched)
        return Evaluator(self, data, has_metrics=has_metrics, losses=self._all_losses if wants_loss else None)

    def _overrides(self, method: str) -> bool:
        return getattr(type(self), method) is not getattr(Trainer, method)


def trainer_class(loaded: Loaded) -> type[Trainer]:
    """The class that `trainer.target` names, or `Trainer` itself.

    Raises:
        ConfigError: SL112, it is no Trainer.
    """
    target = loaded.config.trainer
    if target is None:
        return Trainer
    try:
        return target.resolve(Trainer, loaded.allow)
    except FaultError as error:
        raise loaded.error(TargetOfWrongClass, "trainer.target", error.fault.what, fix=error.fault.fix) from error
