"""Guards what autograd saves, on the steps that are looked at: tensors and parameters that are written unseen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack

from torch import Tensor, nn

from safeloop.autograd.parameter_ledger import ParameterLedger
from safeloop.autograd.recomputation import RecomputationGuard
from safeloop.autograd.recomputed import recomputed_leaves
from safeloop.autograd.saved import SavedTensorGuard
from safeloop.autograd.writes import WriteLog
from safeloop.checks.graph.recomputed import RecomputedOtherwise
from safeloop.checks.graph.unseen import ParameterChangedUnseen, SavedTensorChangedUnseen
from safeloop.faults import Fault


class Guards:
    """The guard of saved tensors and the ledger of parameters, over one forward and its backward passes.

    Args:
        model: what is trained.
        parameters: by full name.
        writes: where a tape notes who writes.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor], writes: WriteLog) -> None:
        self._model = model
        self._guard = SavedTensorGuard(parameters, writes=writes)
        self._ledger = ParameterLedger(parameters, writes=writes)
        self._recomputation = RecomputationGuard(model.buffers)
        self._is_explained = False
        self._following: ExitStack | None = None

    def start(self) -> None:
        """A forward begins."""
        self._ledger.open_forward()
        if self._following is None:
            self._following = ExitStack()
            self._following.enter_context(self._ledger.follow(self._model))
        self._guard.start()
        self._recomputation.start()

    def stop(self) -> None:
        """The forward is over; what it has saved stays guarded until its graph is gone."""
        self._guard.stop()
        self._recomputation.stop()
        if self._following is not None:
            self._following.close()
            self._following = None

    def before_backward(self, roots: Iterable[Tensor], source: str, where: str) -> list[Fault]:
        """Faults of parameters that the backward pass will read again and that are not what they were."""
        if not self._ledger.is_closed:
            return []
        leaves = recomputed_leaves(roots)
        changes = self._ledger.changed(only=leaves) if leaves else ()
        self._is_explained = bool(changes)
        return list(ParameterChangedUnseen.find(changes, model=self._model, terms_source=source, where=where))

    def after_backward(self, source: str, where: str) -> list[Fault]:
        """Faults of tensors that a backward pass has found written or recomputed otherwise; a sync on accelerators."""
        changes = self._guard.verify()
        self._guard.findings.clear()
        faults = list(SavedTensorChangedUnseen.find(changes, model=self._model, terms_source=source, where=where))
        differences = self._recomputation.verify()
        return faults if self._is_explained else [*faults, *RecomputedOtherwise.find(differences, where)]
