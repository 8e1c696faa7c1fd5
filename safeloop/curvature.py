"""Readings of the Hessian of each phase's loss, for `log.curvature`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from safeloop.audit.ledger import FaultLedger
from safeloop.autograd import hessian_trace, top_eigenvalue
from safeloop.checks.setup.watch import CurvatureUnavailable
from safeloop.evaluation import preserved
from safeloop.ingredients import Ingredients, PhaseMethod
from safeloop.seeds import derive

if TYPE_CHECKING:
    from safeloop.assembly import Assembly


class CurvatureReadings:
    """Measures at the logs that are due; the model and the process are bitwise as before.

    Args:
        given: phases, model and config.
        batch: what every reading is taken on.
        ledger: takes the fault of a loss without second derivatives, after which nothing more is read.
    """

    def __init__(self, given: Ingredients, batch: Any, ledger: FaultLedger) -> None:
        self._given = given
        self._batch = batch
        self._ledger = ledger
        self._next: float = given.config.log.curvature.every if given.config.log.curvature else float("inf")

    def at(self, step: int, assembly: Assembly) -> dict[str, float]:
        """Tag -> value after so many steps; empty where no reading is due."""
        section = self._given.config.log.curvature
        if section is None or step < self._next:
            return {}
        self._next = (step // section.every + 1) * section.every
        readings: dict[str, float] = {}
        try:
            for phase in self._given.phases:
                readings |= self._of(phase, assembly)
        except RuntimeError as error:
            self._next = float("inf")
            what = f"torch has no second derivative of this loss: {str(error).splitlines()[0]}"
            fix = "take `log.curvature` out, or write the loss with operations that have one"
            self._ledger.add([CurvatureUnavailable.fault(what, where="log.curvature", fix=fix)], step)
            return {}
        return readings

    def _of(self, phase: PhaseMethod, assembly: Assembly) -> dict[str, float]:
        section = self._given.config.log.curvature
        assert section is not None
        owners = assembly.owners.values() if phase.trains is None else [assembly.owners[n] for n in phase.trains]
        named: dict[str, Tensor] = {n: p for owner in owners for n, p in owner.parameters.items() if p.requires_grad}
        model, seed = self._given.model, derive(self._given.config.run.seed, "curvature")
        found: dict[str, float] = {}
        with preserved(model, seed=seed), torch.enable_grad():
            loss = _total(assembly.readers[phase.name].due(phase.losses(self._batch), 0), assembly.weights)
            if "top_eigenvalue" in section.of:
                found["top_eigenvalue"] = float(top_eigenvalue(loss, named, iterations=section.products).value)
            if "trace" in section.of:
                found["trace"] = float(hessian_trace(loss, named, probes=section.products).value)
        return {f"curvature/{phase.name}/{reading}": value for reading, value in found.items()}


def _total(terms: Mapping[str, Any], weights: Mapping[str, float]) -> Tensor:
    """The weighted sum that the phase differentiates, with its graph."""
    values = [
        weights.get(name, 1.0) * ((term[0] * term[1]).sum() if isinstance(term, tuple) else term)
        for name, term in terms.items()
    ]
    return torch.stack(values).sum()
