"""Decides which steps are looked at in depth, and looks at the model as a whole."""

from __future__ import annotations

from typing import Literal

from torch import nn

from safeloop.audit.ledger import FaultLedger
from safeloop.checks.setup.ownership import ParameterAppearedLate
from safeloop.checks.views import Ownership, SetupView
from safeloop.faults import Fault

Level = Literal["off", "standard", "full"]

FIRST_STEPS = 20
"""At level `standard`, steps that are all looked at in depth; after them only what costs nothing is."""


class StepAudit:
    """Watches the steps of a run: never changes a number, a random state or a mode.

    Args:
        level: `off`: only what the step itself must know; `standard`: every check on the first 20 steps; `full`: on
        every step.
        ledger: where faults go.
        model: watched for parameters that appear after the optimizers were built.
        ownership: who updated what when the run was set up.
    """

    def __init__(self, level: Level, ledger: FaultLedger, model: nn.Module, ownership: Ownership) -> None:
        self._steps = {"off": 0, "standard": FIRST_STEPS, "full": float("inf")}[level]
        self._ledger = ledger
        self._model = model
        self._ownership = ownership
        self._known = _names(model)

    def wants(self, step: int) -> bool:
        """Whether this step is looked at in depth."""
        return step < self._steps

    def forwarded(self, step: int) -> None:
        """Find parameters that the forward created."""
        names = _names(self._model)
        if names == self._known:
            return
        appeared = frozenset(names - self._known)
        self._known = names
        view = SetupView(self._model, self._ownership)
        self._ledger.add(ParameterAppearedLate.find(view, appeared), step)

    def faults(self, faults: list[Fault], step: int) -> None:
        """Record warnings; raise `FaultError` where one is an error."""
        if faults:
            self._ledger.add(faults, step)


def _names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}
