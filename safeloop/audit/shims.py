"""Watches optimizers, gradient scalers and schedules through hooks and instance attributes, all undone on exit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import torch
from torch.amp import GradScaler, grad_scaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from safeloop.checks.process import alive
from safeloop.faults import FaultError


class OptimizerHooks:
    """Tells before and after each step of an optimizer; nothing else of it is touched.

    Args:
        optimizers: by name; a wrapper that is no optimizer of its own is watched by the one that it holds.
        before: is called with the name, the optimizer, and whether the step has a closure.
        after: is called with the name and the optimizer.
        broken: takes errors of these two, which are our own bugs and must not end the loop.
    """

    def __init__(
        self,
        optimizers: Mapping[str, Optimizer],
        before: Callable[[str, Optimizer, bool], None],
        after: Callable[[str, Optimizer], None],
        broken: list[Exception],
    ) -> None:
        self._handles: list[Any] = []
        self._ours: set[int] = set()
        for name, optimizer in optimizers.items():
            hooked = hookable(optimizer)
            if hooked is None:
                continue

            is_own = not _is_torchs(hooked)

            def pre(opt: Optimizer, args: Any, kwargs: Any, owner: str = name, may_nest: bool = is_own) -> None:
                try:
                    if may_nest and is_inner_step(opt):
                        return
                    has_closure = (len(args) > 1 or bool(kwargs)) and _has_closure(args, kwargs)
                    before(owner, opt, has_closure)
                except FaultError:
                    raise
                except Exception as error:
                    broken.append(error)

            def post(opt: Optimizer, args: Any, kwargs: Any, owner: str = name, may_nest: bool = is_own) -> None:
                try:
                    if may_nest and is_inner_step(opt):
                        return
                    after(owner, opt)
                except FaultError:
                    raise
                except Exception as error:
                    broken.append(error)

            self._handles.append(hooked.register_step_pre_hook(pre))
            self._handles.append(hooked.register_step_post_hook(post))
            self._ours.update(handle.id for handle in self._handles[-2:])
            # what hooks of the user's do is no part of the step: ours are the innermost
            hooked._optimizer_step_post_hooks.move_to_end(self._handles[-1].id, last=False)  # type: ignore[attr-defined]

    def are_innermost(self, optimizer: Optimizer) -> bool:
        """Whether between our two hooks nothing runs but a step of PyTorch's own."""
        pre = next(reversed(optimizer._optimizer_step_pre_hooks), None)
        post = next(iter(optimizer._optimizer_step_post_hooks), None)
        return _is_torchs(optimizer) and pre in self._ours and post in self._ours

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _is_torchs(optimizer: Optimizer) -> bool:
    """Whether the step is written by PyTorch, not by a class of the user's."""
    return str(type(optimizer).step.__module__).startswith("torch.optim.")


def is_inner_step(optimizer: Optimizer) -> bool:
    """Whether the step that runs is one of `super().step()`: its hooks are called a second time."""
    if _is_torchs(optimizer):
        return False
    running = 0
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _STEP:
            running += any(one is optimizer for one in frame.f_locals.get("args", ())[:1])
        frame = frame.f_back
    return running > 1


_STEP = Optimizer.profile_hook_step(lambda: None).__code__
"""what torch wraps every `step` in"""


def hookable(optimizer: Any) -> Optimizer | None:
    """The optimizer whose step runs: the one that a wrapper holds, where it has no hooks of its own; None for none."""
    if hasattr(optimizer, "_optimizer_step_pre_hooks"):
        return optimizer  # type: ignore[no-any-return]
    for name in ("optimizer", "base_optimizer", "_optimizer"):
        inner = getattr(optimizer, name, None)
        if inner is not None and inner is not optimizer and (found := hookable(inner)) is not None:
            return found
    return None


def _has_closure(args: Any, kwargs: Any) -> bool:
    return bool([a for a in args[1:] if callable(a)] or kwargs.get("closure"))


@contextmanager
def guarded(broken: list[Exception]) -> Iterator[None]:
    """Our own bugs inside must not end the loop; faults may."""
    try:
        yield
    except FaultError:
        raise
    except Exception as error:
        broken.append(error)


class _Method:
    """A method of one gradient scaler that tells of its calls; copied or pickled, it is the plain method again."""

    def __init__(self, scaler: GradScaler, name: str, call: Callable[..., Any]) -> None:
        self.plain = getattr(scaler, name)
        self._scaler, self._name, self._call = scaler, name, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self.plain, *args, **kwargs)

    def __reduce__(self) -> Any:
        return getattr, (self._scaler, self._name)


class ScalerShim:
    """Tells of `unscale_`, `step` and `update` of one gradient scaler, by attributes of the instance.

    Args:
        scaler: a `torch.amp.GradScaler`.
        told: is called with `unscale`, `before step`, `after step` or `update`, the optimizer or None, and the
            scaler.
        broken: takes errors of `told`.
    """

    def __init__(
        self, scaler: GradScaler, told: Callable[[str, Optimizer | None, GradScaler], None], broken: list[Exception]
    ) -> None:
        self._scaler = scaler

        def tell(what: str, optimizer: Optimizer | None = None) -> None:
            with guarded(broken):
                told(what, optimizer, scaler)

        def step(plain: Callable[..., Any], optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            tell("before step", optimizer)
            out = plain(optimizer, *args, **kwargs)
            tell("after step", optimizer)
            return out

        def unscale_(plain: Callable[..., Any], optimizer: Optimizer) -> None:
            plain(optimizer)
            tell("unscale", optimizer)

        def update(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
            plain(*args, **kwargs)
            tell("update")

        calls = {"step": step, "unscale_": unscale_, "update": update} if scaler.is_enabled() else {}
        self._before = {name: scaler.__dict__[name] for name in calls if name in scaler.__dict__}
        self._methods = {name: _Method(scaler, name, call) for name, call in calls.items()}
        scaler.__dict__.update(self._methods)

    def remove(self) -> None:
        """Put back what was there."""
        for name, method in self._methods.items():
            if self._scaler.__dict__.get(name) is not method:
                continue
            del self._scaler.__dict__[name]
            if name in self._before:
                self._scaler.__dict__[name] = self._before[name]


def is_inside_scaler() -> bool:
    """Whether a method of a gradient scaler is running, also of one that nobody knows of."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(40):
        if frame is None:
            return False
        if frame.f_code.co_filename == grad_scaler.__file__:
            return True
        frame = frame.f_back
    return False


def find_scalers() -> list[GradScaler]:
    """Every gradient scaler of the process, for a loop that does not say which it uses."""
    return alive(GradScaler)


def find_schedulers(optimizers: Iterable[Optimizer]) -> list[LRScheduler]:
    """Every schedule of the process that moves an optimizer which shares a parameter with one of these.

    The schedules inside a chain of schedules are left out: the chain moves them.
    """
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    found = []
    for thing in alive(LRScheduler):
        with suppress(AttributeError, TypeError):
            if any(id(p) in held for group in thing.optimizer.param_groups for p in group["params"]):
                found.append(thing)
    inner = {id(part) for chain in found for part in getattr(chain, "_schedulers", ())}
    return [scheduler for scheduler in found if id(scheduler) not in inner]


def position(scheduler: LRScheduler) -> tuple[Any, Any]:
    """What changes whenever a schedule is moved."""
    return getattr(scheduler, "_step_count", None), getattr(scheduler, "last_epoch", None)


def autocast_depth() -> int:
    """How many autocast regions are open."""
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return int(depth)
