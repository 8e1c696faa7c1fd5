"""What an optimizer is about to do, as an event; and whether it differs from what it has long been doing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from safeloop.audit.journal import Journal, is_zero
from safeloop.audit.shims import is_inside_scaler
from safeloop.autograd.sites import user_site
from safeloop.checks.events import Update
from safeloop.checks.gradients.nonfinite import sample_of

REPEATS = 10
"""Equal events in a row that are told on plain iterations; no check needs more of them."""
SAMPLED = 4
"""Of further ones, one in so many has a small gradient looked at: a NaN stays once it is there."""
EVERY = 64
"""Of further ones, one in so many is told, for what no signature shows."""
MOST = 100
"""Structures that are remembered; a loop with more of them changes by design, as one that drops layers at random"""

_TINY = 1e-10
"""a learning rate below which nothing moves"""

_Signature = tuple[list[bool], list[tuple[int, list[tuple[bool, bool]]]]]


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
        self._structures: set[int] = set()
        """hashes: a signature is as long as the list of parameters"""
        self._signatures: dict[str, _Signature] = {}
        self._repeats: dict[str, int] = {}
        self._samples: dict[str, nn.Parameter | None] = {}

    def is_news(self, owner: str, optimizer: Optimizer) -> bool:
        """Whether an update must be told on a plain iteration: after many of the same kind one more says nothing."""
        signature = _signature(optimizer, self._modules)
        if signature != self._signatures.get(owner):
            self._signatures[owner] = signature
            self._repeats[owner] = 0
            structure = hash(f"{owner} {signature}")
            if structure not in self._structures and len(self._structures) < MOST:
                self._structures.add(structure)
                self._ask()
        self._repeats[owner] += 1
        times = self._repeats[owner]
        if times <= REPEATS or not times % EVERY:
            return True
        return not times % SAMPLED and self._is_bad(owner, optimizer)

    def _is_bad(self, owner: str, optimizer: Optimizer) -> bool:
        """Whether one small gradient on the CPU, where nobody waits for it, holds NaN or infinity."""
        if owner not in self._samples:
            self._samples[owner] = sample_of(optimizer)
        sample = self._samples[owner]
        gradient = None if sample is None else sample.grad
        if gradient is None or gradient.layout is not torch.strided or not gradient.is_cpu or gradient.is_complex():
            return False
        return not math.isfinite(float(gradient.sum().tolist()))  # type: ignore[arg-type]

    def event(
        self, owner: str, optimizer: Optimizer, *, is_deep: bool, has_closure: bool = False, skipped: bool = False
    ) -> Update:
        """An update that is about to happen, or that a gradient scaler has left out."""
        held = self._journal.claim(owner, optimizer)
        if skipped:
            self._repeats[owner] = 0  # the next one that is not is news
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
        )


def is_bad(parameter: Any) -> bool:
    """Whether the gradient of a parameter is not finite; reads the device."""
    if parameter.grad is None:
        return False
    values = parameter.grad._values() if parameter.grad.is_sparse else parameter.grad
    return not math.isfinite(float(values.detach().abs().float().norm()))


def _signature(optimizer: Optimizer, modules: Sequence[nn.Module]) -> _Signature:
    """Modes, of each group whether its rate is zero or tiny, of each parameter whether it is frozen and has a gradient.

    Nothing in it waits for a device.
    """
    found = []
    for group in optimizer.param_groups:
        rate = group.get("lr", 1.0)
        # a tensor may lie on a device: reading it would wait
        size = 2 if isinstance(rate, Tensor) or abs(rate) > _TINY else int(rate != 0)
        found.append((size, [(p.grad is None, p.requires_grad) for p in group["params"]]))
    return [module.training for module in modules], found
