"""From torch's signatures to the fields of a component: what YAML can write, strictly typed, with torch's defaults."""

from __future__ import annotations

import collections.abc
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import torch
from pydantic import Field

from safeloop.component import Bool, Float, Int

DROPPED = {"self", "params", "optimizer", "last_epoch", "size_average", "reduce", "differentiable"}
"""Filled in by the loop, or deprecated, or (`differentiable`) useless where updates run without a graph."""

LIMITS: dict[str, dict[str, Any]] = {
    **{name: {"ge": 0} for name in ("lr", "weight_decay", "eps", "eta_min", "power")},
    **{name: {"gt": 0} for name in ("gamma", "div_factor", "final_div_factor")},
    **{name: {"ge": 1} for name in ("step_size", "T_max", "T_0", "T_mult", "total_iters", "step_size_up")},
    **{name: {"ge": 1} for name in ("step_size_down", "total_steps", "epochs", "steps_per_epoch")},
    "label_smoothing": {"ge": 0, "le": 1},
}
"""What a signature does not say. What torch checks itself is left to a dry construction."""

WORDS: dict[str, Any] = {
    "reduction": Literal["mean", "sum"],
    "line_search_fn": Literal["strong_wolfe"] | None,
    "adjust_lr_fn": Literal["original", "match_rms_adamw"] | None,
}
"""Arguments annotated as `str` that take a few words. A loss term is a scalar, so `reduction: none` is left out."""

_SCALARS: dict[Any, Any] = {int: Int, float: Float, bool: Bool, str: str, type(None): None}
_LISTS = (list, collections.abc.Iterable, collections.abc.Sequence)
_UNWRITABLE = object()
_NAMES = {
    name: value
    for module in (collections.abc, typing)
    for name, value in vars(module).items()
    if not name.startswith("_")
}


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a class of torch, strictly typed."""

    annotation: Any
    default: Any
    """torch's; `...` where it is required"""

    def field(self) -> tuple[Any, Any]:
        """The pydantic field of a spec."""
        return self.annotation, Field(self.default, json_schema_extra={"x-from": "torch"})

    def inherited(self) -> tuple[Any, Any]:
        """The pydantic field of a group, where null means the value of the whole optimizer."""
        return self.annotation | None, Field(None, json_schema_extra={"x-from": "torch"})


@dataclass(frozen=True, slots=True)
class Refusal:
    """Arguments that an object cannot be built with."""

    path: tuple[str | int, ...]
    """the argument to blame: `("betas",)`, `("scheduler", "T_max")`; empty where several together are to blame"""
    reason: str


def arguments(cls: type[Any], meanings: Mapping[Any, Any] | None = None) -> dict[str, Argument] | None:
    """The arguments of `cls` that YAML can write, by name; None where a required one cannot be (a callable, a tensor).

    Args:
        cls: a class of torch, with annotated arguments.
        meanings: annotation -> what to write instead of it.
    """
    found: dict[str, Argument] = {}
    init = cls.__init__
    for name, parameter in inspect.signature(init).parameters.items():
        if name in DROPPED or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        annotation = WORDS.get(name) or _written(_resolved(parameter.annotation, init), meanings or {})
        is_required = parameter.default is parameter.empty
        if annotation is _UNWRITABLE:
            if is_required:
                return None
            continue
        if name in LIMITS and _is_number(annotation):
            annotation = Annotated[annotation, Field(**LIMITS[name])]
        found[name] = Argument(annotation, ... if is_required else parameter.default)
    return found


def refusal(construct: Callable[[dict[str, Any]], object], given: Mapping[str, Any]) -> Refusal | None:
    """Why `construct(given)` fails, with the last argument without which it succeeds; None if it succeeds."""
    reason = _failure(construct, dict(given))
    if reason is None:
        return None
    guilty = [name for name in given if _failure(construct, {k: v for k, v in given.items() if k != name}) is None]
    return Refusal((guilty[-1],) if guilty else (), reason)


def family(module: types.ModuleType, base: type[Any], except_for: frozenset[str] = frozenset()) -> dict[str, type[Any]]:
    """The public subclasses of `base` in a module, by name."""
    return {
        name: cls
        for name, cls in sorted(vars(module).items())
        if isinstance(cls, type)
        and issubclass(cls, base)
        and cls is not base
        and not name.startswith("_")
        and name not in except_for
    }


def union(models: Mapping[str, type[Any]]) -> Any:
    """The discriminated union of models by their `type`."""
    return Annotated[Union[tuple(models.values())], Field(discriminator="type")]  # noqa: UP007


def _failure(construct: Callable[[dict[str, Any]], object], given: dict[str, Any]) -> str | None:
    try:
        construct(given)
    except Exception as error:
        return str(error) or type(error).__name__
    return None


def _resolved(annotation: Any, init: Any) -> Any:
    """The annotation as an object. torch's schedulers import the names in theirs under TYPE_CHECKING only."""
    if not isinstance(annotation, str):
        return annotation
    defined_in = vars(sys.modules[init.__module__])
    known = {**_NAMES, "Tensor": torch.Tensor, "Optimizer": torch.optim.Optimizer, **defined_in}
    try:
        return eval(annotation, known)  # torch's own source, never a user's text
    except NameError:
        return _UNWRITABLE


def _written(annotation: Any, meanings: Mapping[Any, Any]) -> Any:
    """The strict form of an annotation, without the alternatives that YAML cannot write."""
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return annotation
    if origin in (Union, types.UnionType):
        arms = [arm for arm in (_written(arg, meanings) for arg in args) if arm is not _UNWRITABLE]
        return Union[tuple(arms)] if any(arm is not None for arm in arms) else _UNWRITABLE  # noqa: UP007
    if origin is tuple:
        items = [item if item is Ellipsis else _written(item, meanings) for item in args]
        return _UNWRITABLE if _UNWRITABLE in items else tuple[tuple(items)]  # type: ignore[misc]
    if origin in _LISTS:
        item = _written(args[0], meanings)
        return _UNWRITABLE if item is _UNWRITABLE else tuple[item, ...]  # type: ignore[valid-type]
    return next((meaning for known, meaning in meanings.items() if annotation is known), _UNWRITABLE)


def _is_number(annotation: Any) -> bool:
    kinds = [
        arm
        for arm in (get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,))
        if arm is not type(None)
    ]
    return all(kind in (Int, Float) for kind in kinds)
