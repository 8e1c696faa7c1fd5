"""An owner at run time: an optimizer, the parameters it updates, its clipping and its schedule."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from safeloop.autograd.norms import are_uniform
from safeloop.checks.config.training import ScheduleNeverMoves
from safeloop.checks.wording import listed, suggestion
from safeloop.optim.clipping import AdaptiveFields, ClipAdaptively, ClipByNorm, ClipByValue, Clipping
from safeloop.optim.direct import DirectUpdate, direct_update
from safeloop.optim.ownership import aliases, matches
from safeloop.optim.permit import Permit
from safeloop.optim.schedulers import Pace, move_by_metric


class Spec(Protocol):
    """What a config says of one optimizer: see `safeloop.optim.specs`."""

    @property
    def groups(self) -> Sequence[Any]:
        """Parameters with values of their own."""

    @property
    def max_norm(self) -> float | None:
        """The norm that its gradient is clipped to."""

    @property
    def clip_value(self) -> float | None:
        """The largest absolute value that an entry of its gradient may have."""

    @property
    def agc(self) -> AdaptiveFields | None:
        """How its gradient is clipped adaptively."""

    @property
    def scheduler(self) -> Any:
        """The spec of its schedule."""

    def accepts(self, argument: str) -> bool:
        """Whether torch's optimizer has this argument."""

    def arguments(self) -> dict[str, Any]:
        """torch's arguments that the config gives."""

    def build(self, param_groups: list[dict[str, Any]], allow: Collection[str] = (), **defaults: Any) -> Optimizer:
        """The optimizer over these groups; `defaults` are used where the config says nothing."""


@dataclass(frozen=True, slots=True)
class Owner:
    """One optimizer with everything that the step needs of it, decided once."""

    name: str
    optimizer: Optimizer
    parameters: dict[str, nn.Parameter]
    """full name -> parameter, in the optimizer's order"""
    clipping: Clipping | None = None
    scheduler: LRScheduler | None = None
    pace: Pace = "step"
    """after what the schedule moves"""
    metric: str | None = None
    """the metric that the schedule looks at"""
    tensors: list[nn.Parameter] = field(init=False)
    is_uniform: bool = field(init=False)
    permit: Permit = field(init=False)
    """what calls the optimizer's `step()`"""
    direct: DirectUpdate | None = field(init=False)
    """the direct path to the fused kernel; None where `optimizer.step()` is called"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", list(self.parameters.values()))
        object.__setattr__(self, "is_uniform", are_uniform(self.tensors))
        permit = Permit(self.name, self.optimizer)
        object.__setattr__(self, "permit", permit)
        object.__setattr__(self, "direct", direct_update(self.optimizer, permit))

    @property
    def is_fused(self) -> bool:
        """Whether every group runs torch's fused kernel, which takes `found_inf` and bumps no version counter."""
        return all(group.get("fused") for group in self.optimizer.param_groups)

    @property
    def needs_closure(self) -> bool:
        """Whether its update computes the loss several times."""
        return isinstance(self.optimizer, LBFGS)

    @property
    def evaluations(self) -> int | None:
        """How often one update may compute the loss; None where it does not."""
        group = self.optimizer.param_groups[0]
        return (group["max_eval"] or group["max_iter"] * 5 // 4) if self.needs_closure else None

    @property
    def limit(self) -> tuple[float, str] | None:
        """The limit of its clipping and the kind, for the plan."""
        return None if self.clipping is None else (self.clipping.limit, self.clipping.key)

    @property
    def schedule(self) -> str | None:
        """The class of its schedule."""
        return None if self.scheduler is None else type(self.scheduler).__name__

    @property
    def kind(self) -> str:
        """The optimizer's class, and how it runs."""
        how = (", direct" if self.direct is not None else "") if self.is_fused else ""
        return type(self.optimizer).__name__ + (" fused" if self.is_fused else "") + how


def build_owner(
    name: str, spec: Spec, parameters: Mapping[str, nn.Parameter], model: nn.Module, allow: Collection[str] = ()
) -> Owner:
    """The owner that a spec describes, over `parameters` (full name -> parameter), in param groups as its `groups` say.

    What no group takes has the top level's values. A group takes a tied parameter by any of its names; the first
    group wins. `allow` are module prefixes that targets may name.
    """
    names = aliases(model)
    left = dict(parameters)
    groups: list[dict[str, Any]] = []
    ordered: dict[str, nn.Parameter] = {}
    for group in spec.groups:
        taken = {
            n: left.pop(n) for n in list(left) if any(matches(alias, group.params) for alias in names.get(n, (n,)))
        }
        if taken:
            groups.append({"params": list(taken.values()), **group.arguments()})
            ordered |= taken
    if left:
        groups.append({"params": list(left.values())})
        ordered |= left
    optimizer = _built(spec, groups, allow)
    scheduler = None if spec.scheduler is None else spec.scheduler.build(optimizer)
    clipping = _clipping(spec, ordered, names)
    if scheduler is None:
        return Owner(name, optimizer, ordered, clipping)
    metric = getattr(spec.scheduler, "metric", None)
    return Owner(name, optimizer, ordered, clipping, scheduler, spec.scheduler.pace, metric)


def move_by_metrics(owners: Iterable[Owner], metrics: Mapping[str, float]) -> None:
    """Move the schedules that look at a metric, after an evaluation.

    Raises:
        FaultError: SL122, the metric of a schedule was not measured.
    """
    for owner in owners:
        if owner.metric is None or owner.scheduler is None:
            continue
        if owner.metric not in metrics:
            raise ScheduleNeverMoves.error(
                f"the schedule of `{owner.name}` looks at `{owner.metric}`; measured were {listed(metrics)}",
                where=f"optimizers.{owner.name}.scheduler.metric",
                fix=f"name one of: {', '.join(metrics)}" + suggestion(owner.metric, list(metrics)),
            )
        move_by_metric(owner.scheduler, metrics[owner.metric])


def ready_owner(name: str, optimizer: Optimizer, model: nn.Module) -> Owner:
    """The owner that a ready optimizer is; what is no parameter of the model is named after its place in it."""
    name_of = {parameter: full for full, parameter in model.named_parameters()}
    held = {
        name_of.get(tensor, f"{name}[{g}][{i}]"): tensor
        for g, group in enumerate(optimizer.param_groups)
        for i, tensor in enumerate(group["params"])
    }
    return Owner(name, optimizer, held)


def _clipping(
    spec: Spec, parameters: Mapping[str, nn.Parameter], names: Mapping[str, Sequence[str]]
) -> Clipping | None:
    if spec.max_norm is not None:
        return ClipByNorm(spec.max_norm)
    if spec.clip_value is not None:
        if is_complex := [name for name, parameter in parameters.items() if parameter.is_complex()]:
            raise ValueError(f"`clip_value` clamps real numbers, and `{is_complex[0]}` is complex")
        return ClipByValue(spec.clip_value)
    if spec.agc is None:
        return None
    exempt = (n for n in parameters if any(matches(alias, spec.agc.exempt) for alias in names.get(n, (n,))))
    return ClipAdaptively(spec.agc.clip, spec.agc.eps, frozenset(exempt))


def _built(spec: Spec, groups: list[dict[str, Any]], allow: Collection[str]) -> Optimizer:
    """The optimizer, with torch's fused kernel where it has one here and the config does not choose another."""
    says_how = {"fused", "foreach", "capturable"} & spec.arguments().keys()
    dampens = spec.arguments().get("dampening")  # torch's fused SGD cannot begin late with it: see `begin_late`
    if spec.accepts("fused") and not says_how and not dampens:
        with suppress(RuntimeError):  # torch's way to say that it has no fused kernel for a device or a dtype
            optimizer = spec.build([dict(group) for group in groups], allow, fused=True)  # torch fills them in
            _try_fused(optimizer)
            return optimizer
    return spec.build(groups, allow)


def _try_fused(optimizer: Optimizer) -> None:
    """Raise RuntimeError where torch would at the first update: its constructors do not look at the parameters."""
    kinds = {(p.device, p.dtype) for group in optimizer.param_groups for p in group["params"]}
    if any(not dtype.is_floating_point for _, dtype in kinds):
        raise RuntimeError("fused kernels are for real numbers")
    if type(optimizer) is torch.optim.Adagrad:  # of the others every device that has a kernel is known to have it
        for device, dtype in kinds:
            probe = torch.zeros(1, device=device, dtype=dtype, requires_grad=True)
            probe.grad = torch.zeros_like(probe)
            torch.optim.Adagrad([probe], fused=True).step()
