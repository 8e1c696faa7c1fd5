"""What an optimizer is about to do, as an event; and whether it differs from what it has long been doing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from safeloop.audit.journal import Journal, is_zero
from safeloop.audit.shims import is_inside_scaler
from safeloop.autograd.norms import each_norm
from safeloop.autograd.sites import user_site
from safeloop.checks.events import Update

REPEATS = 10
"""Equal updates that are told on plain iterations; no check needs more of them."""
GLANCE = 16
"""Of further plain iterations, one in so many is compared in every respect: what is wrong then mostly stays so."""
LONG = 512
"""Iterations after which a run is a long one"""
LONG_GLANCE = 64
"""`GLANCE` of a long run, which can wait a little longer"""
GLANCES = 8
"""Of further updates that are compared, one in so many is told, for what no signature shows."""
EVERY = GLANCE * GLANCES
MOST = 100
"""Structures that are remembered, and changes from one to another that are told; a loop with more of them changes by
design, as one that drops layers at random"""

_SMALL = 4096
_FIRST = 8
_TINY = 1e-10
"""a learning rate below which nothing moves"""


def glance_gap(iteration: int) -> int:
    """Of plain iterations around this one, one in so many is more than counted."""
    return GLANCE if iteration < LONG else LONG_GLANCE


class _Usual:
    """What an optimizer does again and again."""

    __slots__ = ("absent", "left")

    def __init__(self, absent: list[bool], left: int) -> None:
        self.absent = absent
        """of each parameter, whether it has no gradient"""
        self.left = left
        """updates until the next one that is compared in every respect"""


class Updates:
    """Makes the events of updates, and knows the owners of which nothing new is to be told.

    Args:
        journal: knows the owners and their parameters.
        modules: those whose mode tells training from evaluation.
        ask: is called where an update differs from all before: the next iteration is worth a look.
    """

    def __init__(self, journal: Journal, modules: Sequence[nn.Module], ask: Callable[[], None]) -> None:
        self._journal = journal
        self._modules = tuple(modules)
        self._ask = ask
        self._times: Counter[int] = Counter()
        """hash of a structure, which is as long as the list of parameters -> how often it was looked at"""
        self._last: dict[str, int] = {}
        self._changes: Counter[str] = Counter()
        self._usual: dict[str, _Usual] = {}
        self._was_skipped: set[str] = set()
        self._samples: dict[str, nn.Parameter | None] = {}

    def is_news(self, owner: str, optimizer: Optimizer) -> bool:
        """Whether an update must be told on a plain iteration: after many of the same kind one more says nothing."""
        absent = [p.grad is None for group in optimizer.param_groups for p in group["params"]]
        usual = self._usual.get(owner)
        if usual is not None and usual.left and usual.absent == absent:
            usual.left -= 1
            return False
        return self._is_news(owner, optimizer, absent)

    def _is_news(self, owner: str, optimizer: Optimizer, absent: list[bool]) -> bool:
        structure = hash((owner, *absent, *_respects(optimizer, self._modules)))
        if structure not in self._times:
            if len(self._times) < MOST:
                self._ask()
            else:
                structure = 0  # all further ones together
        self._times[structure] += 1
        times = self._times[structure] - REPEATS
        self._usual[owner] = _Usual(absent, glance_gap(self._journal.iteration) - 1 if times > 0 else 0)
        if owner in self._was_skipped or self._is_change(owner, structure):
            self._was_skipped.discard(owner)
            return True
        return times <= 0 or not times % GLANCES or self._is_bad(owner, optimizer)

    def _is_change(self, owner: str, structure: int) -> bool:
        """Whether it is another structure than the last one; where it changes all the time, the first times."""
        if structure == self._last.get(owner):
            return False
        self._last[owner] = structure
        self._changes[owner] += 1
        return self._changes[owner] <= MOST

    def _is_bad(self, owner: str, optimizer: Optimizer, *, may_wait: bool = False) -> bool:
        """Whether one small gradient holds NaN or infinity; on plain iterations only on the CPU, where nobody waits."""
        if owner not in self._samples:
            self._samples[owner] = _sample_of(optimizer)
        sample = self._samples[owner]
        gradient = None if sample is None else sample.grad
        if gradient is None or gradient.layout is not torch.strided or gradient.is_complex():
            return False
        if not gradient.is_cpu and not may_wait:
            return False
        is_finite = math.isfinite(float(gradient.sum().tolist()))  # type: ignore[arg-type]
        return not is_finite and not bool(gradient.isfinite().all())

    def event(
        self, owner: str, optimizer: Optimizer, *, is_deep: bool, has_closure: bool = False, skipped: bool = False
    ) -> Update:
        """An update that is about to happen, or that a gradient scaler has left out."""
        held = self._journal.claim(owner, optimizer)
        if skipped:
            self._usual.pop(owner, None)  # the next one that is not is news
            self._was_skipped.add(owner)
        skipped = skipped or (is_deep and bool(getattr(optimizer, "found_inf", False)))  # a fused step skips itself
        frozen = frozenset(name for name, p in held if not p.requires_grad)
        looked_at = [(n, p.grad) for n, p in held if p.grad is not None and (n in frozen or is_deep)]
        zero = frozenset(n for n, gradient in looked_at if is_zero(gradient)) if not has_closure else frozenset()
        return Update(
            user_site(),
            self._journal.iteration,
            owner,
            frozenset(name for name, p in held if p.grad is None),
            zero,
            tuple(float(group["lr"]) for group in optimizer.param_groups if "lr" in group),
            skipped or is_inside_scaler(),
            has_closure,
            is_deep,
            frozen,
            frozenset(name for name, p in held if name in frozen and p.grad is not None),
            tuple(name for name, p in held if is_bad(p)) if skipped else (),
            skipped,
            is_bad=not has_closure and self._is_bad(owner, optimizer, may_wait=is_deep),
        )


def is_bad(parameter: Any) -> bool:
    """Whether the gradient of a parameter is not finite; reads the device."""
    if parameter.grad is None:
        return False
    values = parameter.grad._values() if parameter.grad.is_sparse else parameter.grad
    return not math.isfinite(float(values.detach().abs().float().norm()))


def are_bad(parameters: Iterable[Any]) -> bool:
    """Whether one gradient is not finite; reads each device once where all are alike."""
    present = [p.grad.detach() for p in parameters if p.grad is not None]
    if not present:
        return False
    return not bool(each_norm(present).isfinite().all())


def _sample_of(optimizer: Any) -> nn.Parameter | None:
    """The smallest of an optimizer's first parameters: a bad gradient on its way back comes to those last."""
    first = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad][:_FIRST]
    return min((p for p in first if p.numel() <= _SMALL), key=lambda p: p.numel(), default=None)


def _respects(optimizer: Optimizer, modules: Sequence[nn.Module]) -> Iterator[int]:
    """Modes, of each group whether its rate is zero or tiny, of each parameter whether it is frozen.

    Nothing in it waits for a device.
    """
    for module in modules:
        yield module.training
    for group in optimizer.param_groups:
        rate = group.get("lr", 1.0)
        # a tensor may lie on a device: reading it would wait
        yield 2 if isinstance(rate, Tensor) or abs(rate) > _TINY else int(rate != 0)
        for p in group["params"]:
            yield p.requires_grad
