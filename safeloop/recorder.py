"""Everything that a run leaves behind: its folder, its records, its weights."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from safeloop.audit.ledger import FaultLedger
from safeloop.faults import Fault
from safeloop.folder import make_run_folder, save_weights, write_text
from safeloop.readings import Readings
from safeloop.sinks.fanout import Fanout, open_sinks
from safeloop.sinks.record import Record, RunInfo
from safeloop.staging import Stage, run_plan
from safeloop.step.report import StepReport

if TYPE_CHECKING:
    from safeloop.assembly import Assembly
    from safeloop.config import Loaded


class Recorder:
    """Opens the run's folder and sinks, hands them records, closes them with the outcome.

    With `log.sinks: []` nothing is written at all: no folder, no weights.
    """

    def __init__(self, loaded: Loaded, stages: Sequence[Stage], model: nn.Module, ledger: FaultLedger) -> None:
        config, assembly = loaded.config, stages[0].assembly
        self.dir: Path | None = None
        self.last: dict[str, float] = {}
        self._model = model
        self._average = assembly.average
        self._audit = assembly.audit
        self._ledger = ledger
        self._fanout = Fanout()
        self.readings = Readings(assembly.owners, assembly.weights, config.log.grad_norms)
        if config.log.sinks:
            name = config.run.name or "run"
            self.dir = make_run_folder(config.run.dir, name)
            write_text(self.dir / "config.yaml", loaded.text)
            write_text(self.dir / "plan.txt", f"{run_plan(stages)}\n")
            self._fanout = open_sinks(config.log.sinks, self._info(loaded, stages))
        for fault, count in ledger.counts.items():
            self._fanout.fault(fault, 0, count)
        ledger.listener = self._fault

    def enter(self, stage: Stage) -> None:
        """Go on with the owners of a stage."""
        self.readings.owners = stage.assembly.owners
        self._audit = stage.assembly.audit

    def progress(self, step: int) -> None:
        """Tell the sinks that show progress that a step is done."""
        self._fanout.progress(step, {})

    def log(self, report: StepReport, epoch: int, more: Mapping[str, float]) -> None:
        """Write the readings since the last log, and `more`."""
        steps = max(1, self.readings.num_steps)
        scalars = self.readings.take(report) | dict(more)
        scalars["perf/audit_ms"] = self._audit.budget.take_spent_ms() / steps
        scalars["safety/faults_total"] = float(len(self._ledger.faults))
        self.last = scalars
        self._fanout.write(Record(report.step + 1, "train", scalars, epoch, time.time()))

    def evaluated(self, step: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """Write the result of an evaluation."""
        scalars = {name if name == "loss/eval" else f"metric/{name}": value for name, value in metrics.items()}
        self._fanout.write(Record(step, "eval", scalars, epoch, time.time()))

    def close(self, outcome: str, step: int) -> None:
        """Save the weights, tell the final count of each fault, close every sink."""
        self._ledger.listener = None
        for fault, count in self._ledger.counts.items():
            if count > 1:
                self._fanout.fault(fault, step, count)
        try:
            if self.dir is not None and step:
                save_weights(self._model, self.dir, step)
                if self._average is not None and self._average.num_averaged:
                    save_weights(self._average.model, self.dir, step, name="average")
        finally:
            self._fanout.close(outcome)

    def _fault(self, fault: Fault, step: int, count: int) -> None:
        self._fanout.fault(fault, step, count)

    def _info(self, loaded: Loaded, stages: Sequence[Stage]) -> RunInfo:
        assert self.dir is not None
        config = loaded.config
        modules = dict.fromkeys(name.rpartition(".")[0] or "(root)" for name, _ in self._model.named_parameters())
        return RunInfo(
            name=self.dir.name,
            dir=self.dir,
            max_steps=_num_steps(stages[0].assembly, config.max_steps),
            plan=str(run_plan(stages)),
            config=loaded.text,
            owners=tuple(dict.fromkeys(name for stage in stages for name in stage.assembly.owners)),
            modules=tuple(modules),
            hparams=_hparams(stages),
        )


def _num_steps(assembly: Assembly, max_steps: int | None) -> int | None:
    """How many steps the run takes; None where nobody can know."""
    program, known = assembly.program, [] if max_steps is None else [max_steps]
    windows = assembly.stream.num_windows(program.window)
    if windows is not None:
        known.append(program.steps_in(windows))
    return min(known, default=None)


def _hparams(stages: Sequence[Stage]) -> dict[str, str | int | float | bool]:
    found: dict[str, str | int | float | bool] = {}
    owners = [(f"{s.name}.{n}" if s.name else n, owner) for s in stages for n, owner in s.assembly.owners.items()]
    for name, owner in owners:
        found[f"{name}.type"] = type(owner.optimizer).__name__
        for key in ("lr", "weight_decay"):
            if key in owner.optimizer.defaults:
                found[f"{name}.{key}"] = float(owner.optimizer.defaults[key])
    return found
