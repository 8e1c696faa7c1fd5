"""`safeloop.audit`: the same checks and codes around a loop that is not ours; undone on exit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from safeloop.audit.ledger import FaultLedger
from safeloop.audit.observer import FIRST_STEPS, Level
from safeloop.checks.stages import gradient_faults, setup_faults
from safeloop.checks.views import GradientsView, SetupView
from safeloop.faults import Fault, FaultError
from safeloop.optim.ownership import owned_by_identity

OnFault = Literal["warn", "raise", "collect"]


class FaultWarning(UserWarning):
    """A fault that `safeloop.audit` found in someone else's loop, with `on_fault="warn"`."""


class Audit:
    """Watches a loop: owners and modules on entry, gradients before each optimizer's step.

    Every fault is found once; `.faults` holds them all. Nothing of the loop is changed, and all hooks are gone on exit.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, nn.Module],
        optimizers: Optimizer | Sequence[Optimizer] | Mapping[str, Optimizer] | None = None,
        *,
        level: Level = "standard",
        on_fault: OnFault = "warn",
        accept: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.model = nn.ModuleDict(dict(model)) if isinstance(model, Mapping) else model
        self.optimizers = _named(optimizers)
        self._level = level
        self._on_fault = on_fault
        self._ledger = FaultLedger(accept)
        self._hooks: list[Any] = []
        self._step = 0

    @property
    def faults(self) -> tuple[Fault, ...]:
        """Every fault so far, in the order of its first appearance."""
        return self._ledger.faults

    def step(self) -> None:
        """Tell that one iteration of the loop is over."""
        self._step += 1

    def __enter__(self) -> Audit:
        if self._level != "off":
            ownership = owned_by_identity(self.model, self.optimizers)
            self._handle(setup_faults(SetupView(self.model, ownership, self.optimizers)))
            for name, optimizer in self.optimizers.items():
                self._hooks.append(optimizer.register_step_pre_hook(self._before_step(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _before_step(self, owner: str) -> Any:
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        held = [tensor for group in self.optimizers[owner].param_groups for tensor in group["params"]]
        parameters: dict[str, Any] = {names.get(tensor, f"{owner}[{i}]"): tensor for i, tensor in enumerate(held)}

        def look(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._level == "full" or self._step < FIRST_STEPS:
                terms: dict[str, Tensor] = {}
                where = f"step {self._step}, before {type(optimizer).__name__}.step() of `{owner}`"
                self._handle(gradient_faults(GradientsView(parameters, terms, self._step, where)))

        return look

    def _handle(self, faults: list[Fault]) -> None:
        known = set(self._ledger.faults)
        try:
            self._ledger.add(faults, self._step)
        except FaultError:
            if self._on_fault == "raise":
                raise
        if self._on_fault == "warn":
            for fault in self._ledger.faults:
                if fault not in known:
                    warnings.warn(str(fault), FaultWarning, stacklevel=3)


def audit(
    model: nn.Module | Mapping[str, nn.Module],
    optimizers: Optimizer | Sequence[Optimizer] | Mapping[str, Optimizer] | None = None,
    *,
    level: Level = "standard",
    on_fault: OnFault = "warn",
    accept: Mapping[str, Sequence[str]] | None = None,
) -> Audit:
    """Watch any training loop and name its gradient bugs: `with sl.audit(model=model, optimizers=optimizer): ...`.

    Args:
        model: the module that is trained, or several by name.
        optimizers: one, several, or several by name, each watched through its own step hook; without any, only the
        model is.
        level: `off`, `standard` (gradients on the first 20 iterations) or `full` (on every one).
        on_fault: `warn` with a `FaultWarning`, `raise` a `FaultError`, or only `collect` in `.faults`.
        accept: code -> name patterns of faults that are meant to be there.
    """
    return Audit(model, optimizers, level=level, on_fault=on_fault, accept=accept)


def _named(optimizers: Optimizer | Sequence[Optimizer] | Mapping[str, Optimizer] | None) -> dict[str, Optimizer]:
    if optimizers is None:
        return {}
    if isinstance(optimizers, Optimizer):
        return {"main": optimizers}
    if isinstance(optimizers, Mapping):
        return dict(optimizers)
    return {f"optimizer{index}": optimizer for index, optimizer in enumerate(optimizers)}
