"""Watches every operation, and notes the ones that give NaN or infinity from finite values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from safeloop.nonfinite.birth import Birth, Kind, Reading
from safeloop.nonfinite.calls import Call, CallMap
from safeloop.nonfinite.frames import user_place
from safeloop.nonfinite.modules import ModuleStack
from safeloop.nonfinite.reading import count_bad, kind_of, read, tensors_in
from safeloop.nonfinite.taint import NONE, Births, Taint, key_of

_MASKS = "full full_like new_full fill scalar_tensor lift_fresh lift_fresh_copy masked_fill where index_fill index_put"
_MEMORY = "empty empty_like empty_strided empty_permuted new_empty new_empty_strided resize set"
BENIGN = frozenset(f"{_MASKS} {_MEMORY} scatter constant_pad_nd".split())
"""Operations whose infinities are meant: masks and initial values; and memory that nobody has written yet."""
_OVERWRITES = frozenset(("copy", "fill", "zero", "normal", "uniform", "bernoulli", "random", "exponential"))
"""In-place operations that do not look at what they write over."""
_MASKED = ("softmax", "log_softmax", "safe_softmax", "logsumexp", "scaled_dot_product")
_SAVED = ("self", "result", "other", "input", "exponent", "x1", "x2", "mat1", "mat2", "norm", "target")


class BirthWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes births while it is entered: NaN without a NaN among the inputs, infinity without a non-finite input.

    What comes of a bad tensor inherits its births, so that `cause` can tell which birth reached a tensor. Every
    operation then waits for the device: only for replays.
    """

    def __init__(self, modules: ModuleStack, calls: CallMap, given: dict[int, str], top: FrameType | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.births: list[Birth] = []
        self.taint = Taint()
        self._recomputed: dict[int, Call] = {}
        self._modules = modules
        self._calls = calls
        self._given = given
        self._top = top

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written, read_from = _arguments(func, args, kwargs)
        if torch.is_grad_enabled() and torch._C._current_autograd_node() is not None:
            self._remember(func)
        before = [read(tensor) for tensor in read_from] if written else None  # a write would falsify it
        result = func(*args, **kwargs)
        births: Births | None = None
        for tensor in _distinct([*tensors_in(result), *written]):
            kind = kind_of(tensor)
            if kind is None:
                if written:
                    self.taint.forget(tensor)
                continue
            if births is None:
                births = self._births_of(func, tensor, kind, read_from, before, args)
            self.taint.put(tensor, births, is_write=bool(written))
        return result

    def _remember(self, func: Any) -> None:
        """Of a forward that runs inside a backward, a re-entrant checkpoint's, the line behind each node.

        The function mode is off there. The node of an operation is made just before the operation is run.
        """
        number = torch.autograd._get_sequence_nr() - 1  # type: ignore[attr-defined]
        if number not in self._recomputed:
            self._recomputed[number] = Call(_name(func), user_place(self._top, skip=2), self._modules.path)

    def _births_of(
        self, func: Any, tensor: Tensor, kind: Kind, inputs: list[Tensor], before: list[Reading] | None, args: Any
    ) -> Births:
        """The births that a bad result descends from, its own among them if it is one."""
        readings = before if before is not None else [read(one) for one in inputs]
        bad = [(one, reading) for one, reading in zip(inputs, readings, strict=True) if not reading.is_finite]
        found = NONE.union(*(self._known(one, reading) for one, reading in bad))
        if bad and (kind == "inf" or any(reading.num_nan for _, reading in bad)):
            return found
        op = _name(func)
        if op.startswith(_MASKED) and all(r.num_inf == r.num_negative_inf for _, r in bad):
            found = NONE  # -inf is how one masks: what went wrong is that nothing was left
        self.births.append(self._birth(op, tensor, kind, [*readings, *_numbers(func, args)]))
        return found | {len(self.births) - 1}

    def _known(self, tensor: Tensor, reading: Reading) -> Births:
        births = self.taint.of(tensor)
        if births is None:  # no operation made it: it was there before, or came from outside of torch
            kind: Kind = "nan" if reading.num_nan else "inf"
            name, bad = self._given.get(key_of(tensor), ""), (reading.num_nan or reading.num_inf)
            place = None if name else user_place(self._top, skip=2)
            is_benign = kind == "inf" and not name.startswith("parameter")
            self.births.append(
                Birth(
                    "given", name or "a constant", kind, bad, reading.size, reading.dtype,
                    place=place, module=self._modules.path, is_benign=is_benign,
                )
            )  # fmt: skip
            births = frozenset({len(self.births) - 1})
            self.taint.put(tensor, births)
        return births

    def _birth(self, op: str, tensor: Tensor, kind: Kind, inputs: list[Reading]) -> Birth:
        node = torch._C._current_autograd_node()
        bad, size = count_bad(tensor)
        dtype = str(tensor.dtype).removeprefix("torch.")
        place = user_place(self._top, skip=2)
        if node is None:
            return Birth(
                "forward", op, kind, bad, size, dtype,
                place=place, module=self._modules.path, inputs=tuple(inputs),
                is_benign=op in BENIGN or (kind == "inf" and any(reading.num_inf for reading in inputs)),
            )  # fmt: skip
        call = self._calls.calls.get(node) or self._recomputed.get(node._sequence_nr()) or Call("", None, "")
        return Birth(
            "backward", op, kind, bad, size, dtype,
            node=node.name(), call=call.name, place=place or call.place, module=call.module,
            inputs=tuple(inputs), saved=tuple(_saved(node)), is_custom=hasattr(node, "_forward_cls"),
            is_benign=op in BENIGN,
        )  # fmt: skip


def _saved(node: Any) -> Iterable[Reading]:
    """What the forward kept for a node, as far as Python may look at it."""
    for name in _SAVED:
        try:
            value = getattr(node, f"_saved_{name}", None)
        except RuntimeError:  # the graph is freed, or what was saved was written since
            continue
        if isinstance(value, Tensor) and not torch._C._functorch.is_functorch_wrapped_tensor(value):
            yield read(value, f"{name} ")


def _numbers(func: Any, args: tuple[Any, ...]) -> Iterable[Reading]:
    """The plain numbers that an operation computes with: an exponent, a divisor."""
    for value, argument in zip(args, func._schema.arguments, strict=False):
        if isinstance(value, (int, float)) and str(argument.type) in ("number", "Tensor"):
            low = float(value) if math.isfinite(value) else 0.0
            bad = (int(math.isnan(value)), int(math.isinf(value)), int(value == -math.inf))
            yield Reading("", (), "number", low, low, int(value == 0), *bad)


def _name(func: Any) -> str:
    """`softmax` for `aten::_softmax`, `div` for `aten::div_`."""
    name: str = func._schema.name.partition("::")[2]
    return name.strip("_")


def _distinct(tensors: Iterable[Tensor]) -> Iterable[Tensor]:
    return {id(tensor): tensor for tensor in tensors}.values()


def _arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that an operation writes into, and those that it reads."""
    if not func._schema.is_mutable:
        return [], list(tensors_in((args, kwargs)))
    written: list[Tensor] = []
    read_from: list[Tensor] = []
    for index, argument in enumerate(func._schema.arguments):
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        if is_written:
            written += tensors_in(value)
        if not (is_written and (argument.kwarg_only or _name(func) in _OVERWRITES)):
            read_from += tensors_in(value)
    return written, read_from
