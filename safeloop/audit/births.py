"""Looks at the calls of a loop that is not ours for the first NaN or infinity of a forward that reaches the loss."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from safeloop.audit.telling import with_birth
from safeloop.autograd.opnames import writes_to
from safeloop.autograd.sites import Site, is_user_code, site_of, user_frame
from safeloop.autograd.tape import Call, Tape
from safeloop.checks.source import Place, at
from safeloop.checks.terms.kinds import TermIsNotFinite
from safeloop.faults import Fault
from safeloop.nonfinite import Birth, Locator
from safeloop.nonfinite.birth import Kind
from safeloop.nonfinite.reading import count_bad, kind_of, tensors_in
from safeloop.nonfinite.taint import NONE, Births, Taint
from safeloop.nonfinite.watch import BENIGN

_MEANT = BENIGN | {"__setitem__", "tensor", "as_tensor", "pad", "masked_scatter"}
"""Functions whose infinities are meant: masks, initial values; and memory that nobody has written yet."""
_MASKED = frozenset(("softmax", "log_softmax", "logsumexp", "scaled_dot_product_attention"))
_IMPURE = frozenset(("batch_norm", "instance_norm"))
"""Functions that write what they are given although their name does not say so."""
_PRODUCTS = frozenset(("mul", "__mul__", "__rmul__"))
_GRADIENTS = frozenset((".grad", ".grad=", "requires_grad_"))
_OPTIM = os.path.dirname(os.path.abspath(torch.optim.__file__)) + os.sep
_MOST = 200
_ROW = 5
"""So many losses in a row that are not finite are told, though nothing is updated by them."""


class ForwardBirths:
    """Looks at the result of every call on the tape, until one fault is told. Each look waits for the device.

    What comes of a bad value inherits its births. Where a loss that is differentiated is not finite, and parameters are
    then updated by its gradients, the first birth that reached it is told, with the line. The call at which it was born
    is run once more, on copies, to learn what it was given.

    Args:
        handle: what becomes of the fault.
    """

    def __init__(self, handle: Callable[[list[Fault]], None]) -> None:
        self._handle = handle
        self._births: list[Birth] = []
        self._known: dict[tuple[str, Site | None], int] = {}
        self._taint = Taint()
        self._pending: Fault | None = None
        self._row = 0
        self._is_over = False

    def look(self, func: Any, call: Call) -> None:
        """Look at a call that has run, or at a backward pass that is about to."""
        if self._is_over or call.name in _GRADIENTS or _is_transformed():
            return
        if call.name == "backward":
            self._look_at_loss(call)
            return
        is_write = writes_to(call.name)
        if is_write and not call.grad_mode and self._pending is not None and _writes_parameter(call):
            self.updating(call.tape.parameters)
            return
        written = [call.args[0]] if is_write and call.args and isinstance(call.args[0], Tensor) else []
        births: Births | None = None
        for tensor in {id(t): t for t in (*tensors_in(call.out), *written)}.values():
            kind = kind_of(tensor)
            if kind is None:
                if is_write:
                    self._taint.forget(tensor)
                continue
            if births is None:
                if not call.grad_mode and _is_update(tensor):
                    self._tell()
                    return
                births = self._births_of(func, call, tensor, kind)
            self._taint.put(tensor, births, is_write=is_write)

    def updating(self, parameters: Iterable[Tensor]) -> None:
        """Parameters are about to be updated: tell what a loss that is not finite has come from, if there was one."""
        if self._pending is None:
            return
        if all(p.grad is None or kind_of(p.grad) is None for p in parameters):
            self._pending = replace(self._pending, severity="warning")  # a mask has kept it from them
        self._tell()

    def _births_of(self, func: Any, call: Call, out: Tensor, kind: Kind) -> Births:
        """The births that a bad result descends from, its own among them if it is one."""
        site = _site()
        name = call.name if call.name.startswith("__") else call.name.strip("_")
        given = {id(t): t for t in tensors_in((call.args, call.kwargs)) if t is not out}.values()
        bad = [(tensor, known) for tensor in given if (known := kind_of(tensor)) is not None]
        found = NONE.union(*(self._origin(tensor, known, call.tape, site) for tensor, known in bad))
        if writes_to(call.name):
            found |= self._taint.of(out) or NONE
        if found and (kind == "inf" or not bad or any(known == "nan" for _, known in bad)):
            return found
        if name in _MASKED:
            found = NONE  # -inf is how one masks: what went wrong is that nothing was left
        if (name, site) not in self._known:
            is_meant = kind == "inf" and (name in _MEANT or bool(bad))
            birth = (None if is_meant else _rerun(func, call, out)) or _plain(name, out, kind, is_meant=is_meant)
            self._known[name, site] = self._add(replace(birth, place=_place(site), module=_module(call.tape)))
        return found | {self._known[name, site]}

    def _origin(self, tensor: Tensor, kind: Kind, tape: Tape, site: Site | None) -> Births:
        """The births of a bad argument; one that no call has made was there before."""
        births = self._taint.of(tensor)
        if births is None:
            names = tape.names_of(tape.live(tensor)) if tensor.is_leaf and tensor.requires_grad else []
            held = f"parameter `{names[0]}`" if names else "a tensor"
            bad, size = count_bad(tensor)
            dtype = str(tensor.dtype).removeprefix("torch.")
            place, is_benign = None if names else _place(site), kind == "inf" and not names
            birth = Birth("given", held, kind, bad, size, dtype, place=place, is_benign=is_benign)
            births = frozenset({self._add(replace(birth, module=_module(tape)))})
            self._taint.put(tensor, births)
        return births

    def _add(self, birth: Birth) -> int:
        self._births.append(birth)
        self._is_over = len(self._births) > _MOST
        return len(self._births) - 1

    def _look_at_loss(self, call: Call) -> None:
        first = call.args[0] if call.args else call.kwargs.get("tensors")
        roots = [(root, kind) for root in tensors_in(first) if (kind := kind_of(root)) is not None]
        if not roots:
            self._pending, self._row = None, 0
            return
        births = NONE.union(*(self._taint.of(root) or NONE for root, _ in roots))
        found = [self._births[index] for index in sorted(births)]
        birth = next((birth for birth in found if not birth.is_benign), found[0] if found else None)
        is_scaled = any(mark.kind == "scaled" for root, _ in roots for mark in call.tape.marks_of(root))
        if birth is None or (is_scaled and birth.op in _PRODUCTS):
            return  # the product with a scale overflows while the right scale is looked for
        line = at(_site(), "the backward pass")
        value = "NaN" if any(kind == "nan" for _, kind in roots) else "infinite"
        self._pending = with_birth(TermIsNotFinite.fault(f"the loss is {value}", where=line), birth, line)
        self._row += 1
        if self._row == _ROW:
            self._tell()

    def _tell(self) -> None:
        fault, self._pending = self._pending, None
        self._is_over = True
        self._births.clear()
        self._taint = Taint()
        if fault is not None:
            self._handle([fault])


def _rerun(func: Any, call: Call, out: Tensor) -> Birth | None:
    """The birth inside of a function, by running it on copies; None where that does not show it."""
    if writes_to(call.name) or call.name in _IMPURE:
        return None
    devices = [out.device] if out.is_cuda else []
    with suppress(Exception), warnings.catch_warnings(), torch.random.fork_rng(devices), Locator() as locator:
        warnings.simplefilter("ignore")  # the call itself has said it
        again = func(*_copied(call.args), **_copied(dict(call.kwargs)))
        return locator.cause(list(tensors_in(again)))
    return None


def _plain(name: str, out: Tensor, kind: Kind, *, is_meant: bool) -> Birth:
    """What is known of a birth without running its function again."""
    bad, size = count_bad(out)
    return Birth("forward", name, kind, bad, size, str(out.dtype).removeprefix("torch."), is_benign=is_meant)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in value.items()}
    return value


def _site() -> Site | None:
    frame = user_frame()
    return None if frame is None else site_of(frame)


def _place(site: Site | None) -> Place | None:
    return None if site is None else Place(*site)


def _module(tape: Tape) -> str:
    return "" if tape.module == "(root)" else tape.module


def _is_update(tensor: Tensor) -> bool:
    """Whether a bad value, without grad mode, is what an optimizer makes of a bad gradient: the forward is over."""
    if tensor.is_leaf and tensor.requires_grad:
        return True
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_user_code(frame.f_code):
        if frame.f_code.co_filename.startswith(_OPTIM):
            return True
        frame = frame.f_back
    return False


def _writes_parameter(call: Call) -> bool:
    """Whether a call writes a parameter."""
    first = next(tensors_in(call.args[:1]), None)
    return first is not None and first.is_leaf and first.requires_grad


def _is_transformed() -> bool:
    """Whether a transform of torch.func is running, whose tensors cannot be read."""
    return torch._C._functorch.peek_interpreter_stack() is not None
