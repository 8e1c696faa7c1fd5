"""The Trainer: declare what is trained by which loss; the loop itself is `Trainer._loop`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from safeloop.assembly import Assembly, Ingredients, PhaseMethod, assemble, probe
from safeloop.audit.ledger import FaultLedger
from safeloop.bring import bring
from safeloop.checks.config.run import LossAndLosses, NoLoss
from safeloop.checks.config.target import TargetOfWrongClass
from safeloop.checks.config.training import AverageNeverTaken
from safeloop.checks.data.source import DataEndedEarly
from safeloop.checks.source import where_defined
from safeloop.checks.terms.kinds import TermIsNotFinite
from safeloop.checks.views import GradientsView
from safeloop.config import Loaded, load
from safeloop.data.count import count
from safeloop.data.move import Mover, resolve_device
from safeloop.declared import declared_losses, declared_metrics
from safeloop.evaluation import evaluate, wants_grad
from safeloop.evaluation.stand_in import standing_in
from safeloop.faults import Fault, FaultError
from safeloop.phases import PhaseMark, phases_of
from safeloop.plan import StepPlan
from safeloop.recorder import Recorder
from safeloop.seeds import derive, seed_everything
from safeloop.step import run_step
from safeloop.step.terms import term_value
from safeloop.stream import DataEnded


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    steps: int
    epochs: int
    metrics: dict[str, float]
    """of the last evaluation"""
    losses: dict[str, float]
    """loss term -> its value at the last log; `train` is their weighted sum"""
    faults: tuple[Fault, ...]
    dir: Path | None
    outcome: str
    """`finished`, or `data ended` where the data ran out before `max_steps`"""
    seconds: float


class Trainer:
    """Trains a model by a declared plan: override `loss` or `losses`, and `metrics`; sections configure the rest.

    Args:
        config: a YAML file, or what `safeloop.config.load` made of one.
        model: a module, used as it is; or the config section.
        data: a Dataset (a loader is built), a DataLoader or any iterable of ready micro-batches; or the config
        section, whose
            `train` and `eval` may be such objects too.
        eval_data: the same for evaluation.
        optimizers: one spec, several by name, or ready `torch.optim` objects, which are never edited.
        overrides: `a.b=c` strings, as on the command line.
        allow_modules: further module prefixes that `target:` may name.
        sections: any other section of the config (`run`, `losses`, `log`, ...) as a dict or a model; wins over the
        file.

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
        marks = self._marks = phases_of(type(self))
        written = [name for name in ("loss", "losses") if _is_overridden(self, name)] + list(marks)[:1]
        if len(written) > 1:
            raise LossAndLosses.error(
                f"{type(self).__name__} defines both `{written[0]}` and `{written[1]}`",
                where=where_defined(getattr(type(self), written[1])),
                fix="keep one: `loss` for a single term, `losses` for a dict of terms, `@phase` methods for phases",
            )
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
        self._eval_data = brought.eval_source(self.loaded)
        self._losses = None if written else declared_losses(self.loaded, lambda: self.model, self.device)
        self._metrics = declared_metrics(self.loaded, lambda: self.model, self.device)
        self._has_metrics = _is_overridden(self, "metrics") or bool(self._metrics.functions)
        wants_loss = self.config.evaluate.loss
        self._evaluates_loss = not self._has_metrics if wants_loss is None else wants_loss
        self._assembly: Assembly | None = None

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

    def losses(self, batch: Any) -> Mapping[str, Tensor | tuple[Tensor, Tensor]]:
        """The loss terms of one micro-batch by name, each a 0-d tensor, or `(tensor, weights)` of one shape."""
        return {"loss": self.loss(batch)} if self._losses is None else self._losses(batch)

    def metrics(self, batch: Any) -> Mapping[str, Any]:
        """What is measured on one evaluation micro-batch, by name, without gradients and in eval mode.

        A tensor with a dimension is pooled element by element, a 0-d value is weighted by `count(batch)`, an object
        with `update`, `compute` and `reset` is used as it is.
        """
        return self._metrics(batch)

    def count(self, batch: Any) -> int:
        """How many samples a micro-batch holds: the leading dimension of its first tensor."""
        return count(batch)

    def count_tokens(self, batch: Any) -> int:
        """How many tokens a micro-batch holds; override it for `accumulate.weight_by: tokens`."""
        return self.count(batch)

    def plan(self) -> StepPlan:
        """The step plan, after the set-up and one forward on the first micro-batch; nothing is trained."""
        self.check()
        return self._assembled().plan

    def check(self) -> list[Fault]:
        """Set up, run one forward on the first micro-batch, and check its terms; nothing is trained.

        Raises:
            FaultError: the first error, with all others.
        """
        assembly = self._assembled()
        for phase, returned in probe(self._ingredients(), assembly.stream).items():
            reader = assembly.readers[phase]
            self._ledger.add(reader.faults(reader.due(returned, 0), is_first=True))
            values = {name: term_value(term) for name, term in returned.items()}
            self._ledger.add(TermIsNotFinite.find(GradientsView({}, values, 0, reader.rules.source)))
        return list(self.faults)

    def fit(self) -> RunResult:
        """Train as the config says.

        Raises:
            FaultError: before any parameter has been changed by what the fault is about.
        """
        started = time.perf_counter()
        assembly = self._assembled()
        seed_everything(self.config.run.seed)
        recorder = Recorder(self.loaded, assembly, self.model, self._ledger)
        outcome = "failed"
        metrics: dict[str, float] = {}
        try:
            outcome, metrics = self._loop(assembly, recorder)
        except FaultError as error:
            self._ledger.raised(error, self.step)
            raise
        except KeyboardInterrupt:
            outcome = "interrupted"
            raise
        finally:
            with suppress(FaultError):  # what ended the run is on its way to the user already
                assembly.gate.finish()
            recorder.close(outcome, self.step)
        losses = {tag.removeprefix("loss/"): v for tag, v in recorder.last.items() if tag.startswith("loss/")}
        seconds = time.perf_counter() - started
        return RunResult(self.step, self.epoch, metrics, losses, self.faults, recorder.dir, outcome, seconds)

    def _loop(self, run: Assembly, recorder: Recorder) -> tuple[str, dict[str, float]]:
        every, max_steps = self.config.log.every, self.config.run.max_steps
        evaluate_every = self.config.evaluate.every if self._eval_data is not None else None
        program, stream, readings = run.program, run.stream, recorder.readings
        metrics: dict[str, float] = {}
        last_evaluated = -1
        readings.resume(stream.num_samples)
        while max_steps is None or self.step < max_steps:
            is_due = (self.step + 1) % every == 0 or self.step + 1 == max_steps
            try:
                report = run_step(program, stream, self.step, wants_modules=is_due)
            except DataEnded:
                break
            readings.add(report)
            self.step += 1
            wants_metrics = evaluate_every is not None and self.step % evaluate_every == 0
            if not is_due and not wants_metrics:
                recorder.progress(self.step)
                continue
            readings.pause(stream.num_samples)
            if is_due:
                recorder.log(report, stream.epoch)
            if wants_metrics:
                metrics, last_evaluated = self._evaluate(recorder), self.step
            readings.resume(stream.num_samples)
        run.gate.finish()
        if self._eval_data is not None and last_evaluated != self.step:
            metrics = self._evaluate(recorder)
        return self._outcome(), metrics

    def _outcome(self) -> str:
        max_steps = self.config.run.max_steps
        if self.config.average is not None and self.averaged_model is None and self.step:
            self._ledger.add([_never_averaged(self.step)], self.step)
        if max_steps is None or self.step >= max_steps:
            return "finished"
        if self.config.run.max_epochs is not None:
            return "finished"
        self._ledger.add([_ended_early(self.step, max_steps)], self.step)
        return "data ended"

    def _evaluate(self, recorder: Recorder) -> dict[str, float]:
        assert self._eval_data is not None
        move = Mover(self.device)
        precision = self._assembled().precision

        def measure(batch: Any) -> dict[str, Any]:
            with precision.autocast():
                return self._measure(batch)

        with standing_in(self, self.averaged_model):
            metrics = evaluate(
                measure,
                self.model,
                (move(batch) for batch in self._eval_data.epoch(0)),
                count=self.count,
                wants_grad=wants_grad(self.metrics),
                seed=derive(self.config.run.seed, "evaluate"),
                where=where_defined(type(self).metrics),
            )
        recorder.evaluated(self.step, self.epoch, metrics)
        return metrics

    def _measure(self, batch: Any) -> dict[str, Any]:
        measured = self.metrics(batch) if self._has_metrics else {}
        if not self._evaluates_loss or not isinstance(measured, Mapping):
            return measured  # type: ignore[return-value]
        weights = self._assembled().weights
        terms = {name: term for phase in self._phases() for name, term in phase.losses(batch).items()}
        return {"loss/eval": sum(weights.get(name, 1.0) * term_value(term) for name, term in terms.items()), **measured}

    def _assembled(self) -> Assembly:
        if self._assembly is None:
            if not self.model.training:
                self.model.train()
            self.model.to(self.device)
            self._assembly = assemble(self._ingredients(), self.device, self._ledger)
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
            count_tokens=self.count_tokens if _is_overridden(self, "count_tokens") else None,
            optimizers=self._brought.optimizers,
        )

    def _phases(self) -> list[PhaseMethod]:
        if self._marks:
            return [self._marked_phase(name, mark) for name, mark in self._marks.items()]
        is_single = _is_overridden(self, "loss")
        source = where_defined(type(self).loss if is_single else type(self).losses)
        terms = ["loss"] if is_single else list(self.config.losses)
        return [PhaseMethod("train", self.losses, source, terms, not is_single and self._losses is None)]

    def _marked_phase(self, name: str, mark: PhaseMark) -> PhaseMethod:
        section = self.config.phases.get(name)
        return PhaseMethod(
            name,
            getattr(self, name),
            where_defined(getattr(type(self), name)),
            terms=(),
            is_open=True,
            trains=(section and section.trains) or mark.trains,
            repeat=(section and section.repeat) or mark.repeat,
            every=(section and section.every) or mark.every,
        )


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


def _is_overridden(trainer: Trainer, method: str) -> bool:
    return getattr(type(trainer), method) is not getattr(Trainer, method)


def _never_averaged(steps: int) -> Fault:
    return AverageNeverTaken.fault(
        f"the run ended after {steps} steps, and none of their weights were averaged",
        where="average",
        fix="lower `average.start`; the metrics are those of the live weights",
        severity="warning",
    )


def _ended_early(steps: int, max_steps: int) -> Fault:
    return DataEndedEarly.fault(
        f"the data ended after {steps} of {max_steps} steps, and it can be read only once",
        where="data.train",
        fix=f"pass a list, a Dataset or a DataLoader, which can be read again, or set `run.max_steps` to {steps}",
    )
