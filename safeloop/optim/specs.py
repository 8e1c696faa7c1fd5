"""Optimizers as config: a discriminated union by `type`, generated from the signatures of torch's optimizers."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

import torch
from pydantic import Discriminator, Field, Tag, create_model
from torch.optim import Optimizer

from safeloop.component import Component, Float
from safeloop.optim.clipping import AdaptiveClipping
from safeloop.optim.schedulers import SCHEDULERS as SCHEDULERS
from safeloop.optim.schedulers import AnyScheduler as AnyScheduler
from safeloop.optim.schedulers import SchedulerSpec as SchedulerSpec
from safeloop.optim.schedulers import move_by_metric
from safeloop.signatures import Refusal, arguments, family, refusal
from safeloop.target import TargetSpec

Patterns = Annotated[tuple[str, ...], Field(min_length=1)]
"""`fnmatchcase` patterns over full parameter names; `*` crosses dots."""

_OURS: dict[str, Any] = {"x-from": "safeloop"}
_SWITCHES = frozenset({"foreach", "fused", "capturable"})
"""How an optimizer runs, not what it computes: one choice for all its groups."""


class GroupSpec(Component):
    """Parameters of an optimizer that have values of their own; what is not written is the optimizer's."""

    keeps_foreign_defaults: ClassVar[bool] = True

    params: Patterns = Field(json_schema_extra=_OURS)
    """patterns over full parameter names; `*` crosses dots"""

    def arguments(self) -> dict[str, Any]:
        """The arguments that were written."""
        given = {name: getattr(self, name) for name in sorted(self.model_fields_set - {"params"})}
        return {name: value for name, value in given.items() if value is not None}


class OwnerSpec(Component):
    """An optimizer: the parameters it owns, its clipping and its schedule."""

    params: Patterns | Literal["rest"] = Field(default=("*",), json_schema_extra=_OURS)
    """patterns over full parameter names (`*` crosses dots), or `rest`: what no other optimizer took"""
    groups: tuple[GroupSpec, ...] = Field(default=(), json_schema_extra=_OURS)
    """parameters with values of their own; the first group that matches takes a parameter"""
    max_norm: Float | None = Field(default=None, gt=0, json_schema_extra=_OURS)
    """clip the gradient to this norm, over all parameters of this optimizer; null: no clipping"""
    clip_value: Float | None = Field(default=None, gt=0, json_schema_extra=_OURS)
    """clip each entry of the gradient to this absolute value; null: no clipping"""
    agc: AdaptiveClipping | None = Field(default=None, json_schema_extra=_OURS)
    """clip the gradient of each unit by the norm of its weights; null: no clipping"""
    scheduler: AnyScheduler | None = Field(default=None, json_schema_extra=_OURS)
    """learning rate schedule; null: the rate stays"""

    @property
    def label(self) -> str:
        """Its class, as the config names it."""
        raise NotImplementedError

    @classmethod
    def accepts(cls, argument: str) -> bool:
        """Whether its class is known to have this argument."""
        return False

    def arguments(self) -> dict[str, Any]:
        """The arguments that were written."""
        raise NotImplementedError

    def build(self, param_groups: list[dict[str, Any]], allow: Collection[str] = (), **defaults: Any) -> Optimizer:
        """The optimizer over `param_groups`; `allow` is for targets, `defaults` serve where nothing is written."""
        raise NotImplementedError


class TargetGroup(GroupSpec):
    """A param group of an optimizer that is given by its class."""

    args: dict[str, Any] = Field(default_factory=dict)
    """arguments by name"""

    def arguments(self) -> dict[str, Any]:
        return dict(self.args)


class _Named(Component):
    """The fields that come first where an optimizer is given by its class."""

    target: str
    """`package.module:Class`; the module must be allowed"""
    args: dict[str, Any] = Field(default_factory=dict)
    """arguments by name, without the parameters"""


class TargetOptimizer(OwnerSpec, _Named):
    """An optimizer given by its class: a subclass of `torch.optim.Optimizer` of an allowed module."""

    groups: tuple[TargetGroup, ...] = Field(default=(), json_schema_extra=_OURS)
    """parameters with values of their own; the first group that matches takes a parameter"""

    @property
    def label(self) -> str:
        return f"target {self.target}"

    def arguments(self) -> dict[str, Any]:
        return dict(self.args)

    def build(self, param_groups: list[dict[str, Any]], allow: Collection[str] = (), **defaults: Any) -> Optimizer:
        spec = TargetSpec(target=self.target, args=self.args)
        make: Any = spec.resolve(Optimizer, allow)
        optimizer: Optimizer = make(param_groups, **{**defaults, **spec.built_args(allow)})
        return optimizer


class _Typed(Component):
    """The field that comes first where an optimizer is torch's."""

    type: str


class OptimizerSpec(OwnerSpec, _Typed):
    """An optimizer of torch with its arguments, the parameters it owns, its clipping and its schedule."""

    keeps_foreign_defaults: ClassVar[bool] = True
    torch_class: ClassVar[type[Optimizer]]

    @property
    def label(self) -> str:
        return f"type {self.type}"

    @classmethod
    def accepts(cls, argument: str) -> bool:
        """Whether torch's optimizer has this argument."""
        return argument in cls.model_fields and argument not in OptimizerSpec.model_fields

    def arguments(self) -> dict[str, Any]:
        """The arguments of torch that were written; torch's defaults stay torch's."""
        return {name: getattr(self, name) for name in sorted(self.model_fields_set) if self.accepts(name)}

    def build(self, param_groups: list[dict[str, Any]], allow: Collection[str] = (), **defaults: Any) -> Optimizer:
        """The torch optimizer over `param_groups`; `defaults` serve where the config says nothing."""
        make: Any = self.torch_class
        optimizer: Optimizer = make(param_groups, **{**defaults, **self.arguments()})
        return optimizer


def _model(name: str, cls: type[Optimizer]) -> type[OptimizerSpec]:
    found = arguments(cls) or {}
    own: dict[str, Any] = {argument: one.inherited() for argument, one in found.items() if argument not in _SWITCHES}
    group = create_model(f"{name}Group", __base__=GroupSpec, __module__=__name__, **own)
    group.__doc__ = f"A param group of torch.optim.{name}."
    fields: dict[str, Any] = {"type": (Literal[name], name)}
    fields |= {argument: one.field() for argument, one in found.items()}
    meaning = OptimizerSpec.model_fields["groups"].description
    fields["groups"] = (tuple[group, ...], Field((), description=meaning, json_schema_extra=_OURS))  # type: ignore[valid-type]
    model = create_model(f"{name}Spec", __base__=OptimizerSpec, __module__=__name__, **fields)
    model.__doc__ = f"torch.optim.{name}"
    model.torch_class = cls
    return model


OPTIMIZERS: dict[str, type[OptimizerSpec]] = {
    name: _model(name, cls) for name, cls in family(torch.optim, Optimizer).items()
}
"""type -> its model"""


def _kind(value: Any) -> str | None:
    if isinstance(value, Mapping):
        return str(value["type"]) if "type" in value else "target" if "target" in value else None
    return value.type if isinstance(value, OptimizerSpec) else "target"


if TYPE_CHECKING:
    AnyOptimizer = OwnerSpec
else:
    _KINDS = {"target": TargetOptimizer, **OPTIMIZERS}
    AnyOptimizer = Annotated[
        Union[tuple(Annotated[model, Tag(name)] for name, model in _KINDS.items())],  # noqa: UP007
        Discriminator(_kind),
    ]


def dry_construct(spec: OptimizerSpec, shapes: Sequence[Sequence[int]] = ((2, 2),)) -> Refusal | None:
    """Build the optimizer, its groups and its scheduler on tensors without storage; what torch refuses, or None.

    Args:
        spec: what a config says of one optimizer.
        shapes: shapes of the parameters that it will own; Muon, say, takes matrices only.

    Cost: 0.1 ms, and 2 s for the first one in a process, which imports torch's compiler.
    """
    given = spec.arguments()

    def construct(chosen: dict[str, Any]) -> Optimizer:
        make: Any = spec.torch_class
        optimizer: Optimizer = make([torch.empty(*s, device="meta", requires_grad=True) for s in shapes], **chosen)
        return optimizer

    if refused := refusal(construct, given):
        return refused
    for index, group in enumerate(spec.groups):
        if refused := refusal(lambda own: construct({**given, **own}), group.arguments()):
            return Refusal(("groups", index, *refused.path), refused.reason)
    return _dry_schedule(spec.scheduler, construct, given) if spec.scheduler else None


def _dry_schedule(scheduler: SchedulerSpec, construct: Any, given: dict[str, Any]) -> Refusal | None:
    def move(chosen: dict[str, Any]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of a schedule that moves without an update
            built = (
                type(scheduler)
                .model_construct({"type", *chosen}, type=scheduler.type, **chosen)
                .build(construct(given))
            )
            for _ in range(2):
                built.step() if scheduler.pace != "evaluation" else move_by_metric(built, 0.0)

    refused = refusal(move, scheduler.arguments())
    return Refusal(("scheduler", *refused.path), refused.reason) if refused else None
