"""What `self.penalty` returns: of which function and where; computed later, by the section of its name, when due."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor

from safeloop.autograd.numbers import renumbered
from safeloop.autograd.sites import code_name
from safeloop.checks.penalties.gradient import PenaltyWithoutGradient, SecondDerivativeVanishes
from safeloop.checks.penalties.point import PenaltyOfWrongShape, PenaltyPointNotReached
from safeloop.checks.source import Place
from safeloop.faults import FaultError
from safeloop.penalties.base import Penalty
from safeloop.penalties.gradients import Field, NotReached, Vanished, widened
from safeloop.penalties.inspection import Inspection
from safeloop.penalties.output_jacobian import OutputJacobian

Reduction = Literal["none", "mean", "sum"]


@dataclass(frozen=True, slots=True)
class Request:
    """A penalty that a loss function returns; it has no value yet."""

    at: Tensor
    function: Callable[[Tensor], Any] | None = None
    """what is differentiated; None: `values` were computed already"""
    values: Any = None
    """what was computed from `at`; None where `function` is to be called"""
    targets: Tensor | None = None
    reduction: Reduction = "none"
    """how 0-d values came from those of the samples; `none`: they are not 0-d"""
    place: Place | str = ""
    """where it was asked for"""

    def __call__(
        self, name: str, penalty: Penalty, *, scale: Tensor | None = None, inspection: Inspection | None = None
    ) -> Tensor:
        """The penalty, 0-d, in float32 or wider, with autocast off.

        Args:
            name: its key among the terms.
            penalty: the section of that name.
            scale: the gradient scale of an fp16 run, for an inner backward pass through half precision.
            inspection: looks at the graph on the way, where that is wanted.

        Raises:
            FaultError: SL432 to SL435.
        """
        try:
            with torch.enable_grad(), _autocast_off(self.at.device.type):
                return self._computed(name, penalty, scale, inspection)
        except FaultError as error:
            found = [] if inspection is None else inspection.taken()
            if found and found[0].severity == "error":  # found before, and nearer to the cause
                raise FaultError(found[0], (*found[1:], error.fault, *error.others)) from error
            raise FaultError(error.fault, (*found, *error.others)) from error

    def _computed(self, name: str, penalty: Penalty, scale: Tensor | None, inspection: Inspection | None) -> Tensor:
        field = self._field(name, penalty, scale)
        if inspection is not None:
            inspection.before(name, penalty, field, self._where(name))
        try:
            if inspection is None:
                value = penalty.value(field)
            else:
                with renumbered((field.at, field.values)) as made:
                    made.append(value := penalty.value(field))
        except NotReached:
            raise self._not_reached(name, "the values were not computed from `at`") from None
        except Vanished:
            raise _linear(name, self._where(name)) from None
        if not value.requires_grad:
            raise PenaltyWithoutGradient.error(
                f"`{name}` is a constant: the gradient that it is made of depends on no parameter that is trained here",
                where=self._where(name),
                why="the function is frozen in this phase or without parameters, was computed under no_grad or from "
                "detached weights, or is linear in `at` with fixed weights",
                fix="return the penalty from the phase that trains the function",
            )
        if inspection is not None:
            inspection.after(name, penalty, field, value, self._where(name))
        return value

    def _where(self, name: str) -> str:
        return f"penalty `{name}`" + (f", {self.place}" if self.place else "")

    def _wrong(self, name: str, what: str, fix: str) -> FaultError:
        why = "a penalty is the mean of a number for each sample, from that sample's own gradient"
        return PenaltyOfWrongShape.error(what, where=self._where(name), why=why, fix=fix)

    def _not_reached(self, name: str, reason: str) -> FaultError:
        return PenaltyPointNotReached.error(
            f"`{name}`: {reason}",
            where=self._where(name),
            why="a gradient is taken at the tensor that went into the function, not at one with the same numbers",
            fix="write `x = self.leaf(x)` before the forward and use that `x` for both, or give the function itself: "
            "`self.penalty(function, at=x)`",
        )

    def _field(self, name: str, penalty: Penalty, scale: Tensor | None) -> Field:
        if not self.at.is_floating_point() or self.at.dim() == 0:
            what = f"`at` of `{name}` has dtype {_dtype(self.at)} and shape {list(self.at.shape)}"
            raise self._wrong(name, what, "give it floating-point inputs, `[N, ...]`, with one row for each sample")
        if self.function is None:
            at, values = self.at, self._of(penalty, self.values, name)
            if not at.requires_grad:
                raise self._not_reached(name, "`at` does not require grad")
        else:
            at = self.at.detach().requires_grad_()
            values = self._of(penalty, self.function(at), name)
        if not values.requires_grad:
            raise self._not_reached(name, "the values have no graph: no_grad, detach() or .data lies between")
        self._check_shapes(penalty, values, name)
        if values.dim() == 0 and self.reduction == "mean" and penalty.is_per_sample:
            values = values * len(at)
        return Field(values, at, self.targets, scale if values.dtype == torch.float16 else None)

    def _of(self, penalty: Penalty, values: Any, name: str) -> Tensor:
        if isinstance(penalty, OutputJacobian) and penalty.output is not None:
            values = self._picked(values, penalty.output, name)
        if not isinstance(values, Tensor):
            what = f"`{name}` is of a {type(values).__name__}, not of a tensor"
            raise self._wrong(name, what, "let the function return the tensor that is to be differentiated")
        return values

    def _picked(self, values: Any, path: str, name: str) -> Any:
        for part in path.split("."):
            if isinstance(values, Mapping) and part in values:
                values = values[part]
            elif isinstance(values, (list, tuple)) and part.isdecimal() and int(part) < len(values):
                values = values[int(part)]
            elif not isinstance(values, (Mapping, Tensor)) and hasattr(values, part):
                values = getattr(values, part)
            else:
                known = f"; it has {', '.join(map(str, values))}" if isinstance(values, Mapping) else ""
                what = f"`{name}` is of the output `{path}`, and a {type(values).__name__} has no `{part}`{known}"
                raise self._wrong(name, what, f"correct `penalties.{name}.output`")
        return values

    def _check_shapes(self, penalty: Penalty, values: Tensor, name: str) -> None:
        if not values.is_floating_point():
            raise self._wrong(name, f"the values of `{name}` are {_dtype(values)}", "give it floating-point values")
        if penalty.is_per_sample and values.dim() == 0 and self.reduction == "none":
            raise self._wrong(
                name,
                f"the values of `{name}` have shape [], of {len(self.at)} samples",
                'return one value for each sample, `[N]` or `[N, 1]`: leave the `.mean()` out, `reduction="none"` for '
                "a loss of torch",
            )
        if penalty.is_per_sample and values.dim() > 0 and len(values) != len(self.at):
            raise self._wrong(
                name,
                f"the values of `{name}` have shape {list(values.shape)}, `at` has {list(self.at.shape)}",
                "give both one row for each sample, in the same order",
            )
        if "targets" in type(penalty).model_fields:
            found = "nothing" if self.targets is None else f"shape {list(self.targets.shape)}"
            if self.targets is None or self.targets.shape != self.at.shape:
                what = f"the targets of `{name}` have {found}, `at` has {list(self.at.shape)}"
                raise self._wrong(name, what, "pass `targets=` of the shape of `at`")


def _linear(name: str, where: str) -> FaultError:
    return SecondDerivativeVanishes.error(
        f"`{name}` needs a second derivative, and the gradient does not depend on `at`",
        where=where,
        why="the function is linear in `at`",
        fix="use a smooth nonlinear activation: nn.SiLU, nn.GELU, nn.Tanh, nn.Softplus",
    )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


@contextmanager
def _autocast_off(device: str) -> Iterator[None]:
    is_on = torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if is_on else nullcontext():
        yield


def requested(
    function: Callable[[Tensor], Any] | None, at: Tensor, of: Any, targets: Tensor | None, frame: FrameType
) -> Request:
    """The request of a call of `self.penalty` in `frame`; see there."""
    if (function is None) == (of is None):
        raise ValueError("penalty() takes a function, or `of=` the values that it gave, and not both")
    if not isinstance(at, Tensor):
        raise TypeError(f"penalty() takes a tensor as `at`, not a {type(at).__name__}")
    code = frame.f_code
    place = Place(code.co_filename, frame.f_lineno, code_name(code))
    is_cast = function is not None and at.is_floating_point() and torch.is_autocast_enabled(at.device.type)
    return Request(widened(at) if is_cast else at, function, of, targets, place=place)
