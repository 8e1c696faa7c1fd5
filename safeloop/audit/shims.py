"""Watches optimizers, gradient scalers and schedules through hooks and instance attributes, all undone on exit."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class OptimizerHooks:
    """Tells before and after each step of an optimizer; nothing else of it is touched."""

    def __init__(
        self,
        optimizers: Mapping[str, Optimizer],
        before: Callable[[str, Optimizer, bool], None],
        after: Callable[[str, Optimizer], None],
    ) -> None:
        self._handles: list[Any] = []
        for name, optimizer in optimizers.items():

            def pre(opt: Optimizer, args: Any, kwargs: Any, owner: str = name) -> None:
                before(owner, opt, bool([a for a in args[1:] if callable(a)] or kwargs.get("closure")))

            def post(opt: Optimizer, args: Any, kwargs: Any, owner: str = name) -> None:
                after(owner, opt)

            self._handles.append(optimizer.register_step_pre_hook(pre))
            self._handles.append(optimizer.register_step_post_hook(post))

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class ScalerShim:
    """Tells of `unscale_`, `step` and `update` of one gradient scaler, by attributes of the instance.

    Args:
        scaler: a `torch.amp.GradScaler`.
        told: is called with `unscale`, `before step`, `after step` or `update`, and the optimizer or None.
    """

    def __init__(self, scaler: GradScaler, told: Callable[[str, Optimizer | None], None]) -> None:
        self._scaler = scaler

        def step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            told("before step", optimizer)
            try:
                return type(scaler).step(scaler, optimizer, *args, **kwargs)
            finally:
                told("after step", optimizer)

        def unscale_(optimizer: Optimizer) -> None:
            type(scaler).unscale_(scaler, optimizer)
            told("unscale", optimizer)

        def update(*args: Any, **kwargs: Any) -> None:
            type(scaler).update(scaler, *args, **kwargs)
            told("update", None)

        if scaler.is_enabled():
            scaler.__dict__.update(step=step, unscale_=unscale_, update=update)

    def remove(self) -> None:
        """Take the attributes away."""
        for name in ("step", "unscale_", "update"):
            self._scaler.__dict__.pop(name, None)


def find_scalers() -> list[GradScaler]:
    """Every gradient scaler of the process, for a loop that does not say which it uses."""
    return [thing for thing in gc.get_objects() if _is(thing, GradScaler)]


def find_schedulers(optimizers: Iterable[Optimizer]) -> list[LRScheduler]:
    """Every schedule of the process that moves an optimizer which shares a parameter with one of these.

    The schedules inside a chain of schedules are left out: the chain moves them.
    """
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    found = []
    for thing in gc.get_objects():
        if not _is(thing, LRScheduler):
            continue
        with suppress(AttributeError, TypeError):
            if any(id(p) in held for group in thing.optimizer.param_groups for p in group["params"]):
                found.append(thing)
    inner = {id(part) for chain in found for part in getattr(chain, "_schedulers", ())}
    return [scheduler for scheduler in found if id(scheduler) not in inner]


def position(scheduler: LRScheduler) -> tuple[Any, Any]:
    """What changes whenever a schedule is moved."""
    return getattr(scheduler, "_step_count", None), getattr(scheduler, "last_epoch", None)


def _is(thing: object, kind: type) -> bool:
    """`isinstance` that asks the real type alone: a proxy of somebody's may answer with an import or an error."""
    return issubclass(type(thing), kind)


def autocast_depth() -> int:
    """How many autocast regions are open."""
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return int(depth)
