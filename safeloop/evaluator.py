"""Evaluates a Trainer on its held-out data: its metrics, and its loss where that is wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from safeloop.checks.source import where_defined
from safeloop.data.move import Mover
from safeloop.data.source import Source
from safeloop.evaluation import evaluate, wants_grad
from safeloop.evaluation.stand_in import standing_in
from safeloop.optim.owner import move_by_metrics
from safeloop.penalties.request import Request
from safeloop.seeds import derive
from safeloop.step.terms import term_value

if TYPE_CHECKING:
    from safeloop.assembly import Assembly
    from safeloop.recorder import Recorder
    from safeloop.trainer import Trainer


class Evaluator:
    """What is measured on held-out data, as a function of the weights alone: its random numbers are seeded.

    Args:
        trainer: whose `metrics` and losses are called; an averaged model stands in for its own.
        data: in its own order.
        has_metrics: whether the Trainer says what to measure.
        losses: a batch's loss terms of all phases, evaluated too, as `loss/eval`, without penalties; None: they are
        not.
    """

    def __init__(
        self,
        trainer: Trainer,
        data: Source,
        *,
        has_metrics: bool,
        losses: Callable[[Any], Mapping[str, Any]] | None,
    ) -> None:
        self._trainer = trainer
        self._data = data
        self._has_metrics = has_metrics
        self._losses = losses

    def __call__(self, assembly: Assembly, recorder: Recorder) -> dict[str, float]:
        """Evaluate, record, and move the schedules that follow a metric; the model and all states are as before."""
        trainer, move = self._trainer, Mover(assembly.device)
        source = where_defined(type(trainer).metrics)

        def measure(batch: Any) -> dict[str, Any]:
            with assembly.audit.evaluating(source), assembly.precision.autocast():
                return self._measure(batch, assembly.weights)

        with standing_in(trainer, trainer.averaged_model):
            metrics = evaluate(
                measure,
                trainer.model,
                (move(batch) for batch in self._data.epoch(0)),
                count=trainer.count,
                wants_grad=wants_grad(trainer.metrics),
                seed=derive(trainer.config.run.seed, "evaluate"),
                where=source,
            )
        recorder.evaluated(trainer.step, trainer.epoch, metrics)
        move_by_metrics(assembly.owners.values(), metrics)
        return metrics

    def _measure(self, batch: Any, weights: Mapping[str, float]) -> dict[str, Any]:
        measured = self._trainer.metrics(batch) if self._has_metrics else {}
        if self._losses is None or not isinstance(measured, Mapping):
            return measured  # type: ignore[return-value]
        terms = {name: term for name, term in self._losses(batch).items() if not isinstance(term, Request)}
        total = sum(weights.get(name, 1.0) * term_value(term) for name, term in terms.items())
        return {"loss/eval": total, **measured}
