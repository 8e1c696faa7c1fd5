"""Hears steps of optimizers that a watch was not given, in the first iterations."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from safeloop.autograd.sites import user_site
from safeloop.checks.events import LoopState
from safeloop.checks.update.rebuilt import OptimizerBuiltAgain
from safeloop.faults import Fault


class StrayOptimizers:
    """Listens to every optimizer of the process that steps parameters of the model, until it is closed.

    Args:
        model: whose parameters they are.
        known: the optimizers that are watched.
        state: learns of the line.
        handle: what becomes of faults.
        broken: takes errors of our own.
    """

    def __init__(
        self,
        model: nn.Module,
        known: list[Optimizer],
        state: LoopState,
        handle: Callable[[list[Fault]], None],
        broken: list[Exception],
    ) -> None:
        self._parameters = {id(p): name for name, p in model.named_parameters()}
        self._known: Any = weakref.WeakSet(known)
        self._state = state
        self._check = OptimizerBuiltAgain()
        self._handle = handle
        self._broken = broken
        self._hook: Any = register_optimizer_step_pre_hook(self._before)

    def close(self) -> None:
        """Listen no longer."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        try:
            if optimizer in self._known:
                return
            held = (self._parameters.get(id(p)) for group in optimizer.param_groups for p in group["params"])
            names = [name for name in held if name is not None]
            if not names:
                return
            self._state.stray_step = site = user_site()
            found = list(self._check.stepped(optimizer, names, site))
        except Exception as error:
            self._broken.append(error)
            return
        self._handle(found)
