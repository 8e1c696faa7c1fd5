"""Learning rate schedules as config: a discriminated union by `type`, generated from torch's signatures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, create_model
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from safeloop.component import Component
from safeloop.signatures import arguments, family, union

Pace = Literal["step", "epoch", "evaluation"]
"""After what a schedule moves."""

_OURS: dict[str, Any] = {"x-from": "safeloop"}


class SchedulerSpec(Component):
    """A learning rate schedule of torch."""

    keeps_foreign_defaults: ClassVar[bool] = True
    torch_class: ClassVar[type[LRScheduler]]

    type: str

    @property
    def pace(self) -> Pace:
        """After what it moves."""
        raise NotImplementedError

    def arguments(self) -> dict[str, Any]:
        """The arguments that were written; torch's defaults stay torch's."""
        written = self.model_fields_set - {"type", "per", "metric"}
        return {name: getattr(self, name) for name in sorted(written)}

    def build(self, optimizer: Optimizer) -> LRScheduler:
        """The torch scheduler over an optimizer, whose learning rates it may change at once."""
        given = self.arguments()
        if "schedulers" in given:
            given["schedulers"] = [inner.build(optimizer) for inner in given["schedulers"]]
        make: Any = self.torch_class
        scheduler: LRScheduler = make(optimizer=optimizer, **given)
        return scheduler


class TimedSpec(SchedulerSpec):
    """A schedule that moves with time."""

    per: Literal["step", "epoch"] = Field(default="step", json_schema_extra=_OURS)
    """step: it moves after each step whose update was not skipped; epoch: after each pass over the training data"""

    @property
    def pace(self) -> Pace:
        return self.per


class MetricSpec(SchedulerSpec):
    """A schedule that moves when a metric says so."""

    metric: str = Field(min_length=1, json_schema_extra=_OURS)
    """what it looks at after each evaluation: the name of a metric, or `loss/eval`"""

    @property
    def pace(self) -> Pace:
        return "evaluation"


def move_by_metric(scheduler: LRScheduler, value: float) -> None:
    """One move of a schedule that looks at a metric."""
    assert isinstance(scheduler, ReduceLROnPlateau), "only torch's plateau schedule looks at a metric"
    scheduler.step(value)


_NEED_A_METRIC = frozenset({"ReduceLROnPlateau"})
_COMBINE = frozenset({"SequentialLR", "ChainedScheduler"})


def _models(
    names_of: dict[str, type[Any]], meanings: dict[Any, Any] | None = None, base: type[SchedulerSpec] = TimedSpec
) -> dict[str, type[SchedulerSpec]]:
    models: dict[str, type[SchedulerSpec]] = {}
    for name, cls in names_of.items():
        found = arguments(cls, meanings)
        if found is None:
            continue
        fields: dict[str, Any] = {"type": (Literal[name], name)}
        fields |= {argument: one.field() for argument, one in found.items()}
        models[name] = create_model(f"{name}Spec", __base__=base, __module__=__name__, **fields)
        models[name].__doc__ = f"torch.optim.lr_scheduler.{name}"
        models[name].torch_class = cls
    return models


_ALL = family(lr_scheduler, LRScheduler)
_SINGLE = _models({name: cls for name, cls in _ALL.items() if name not in _COMBINE | _NEED_A_METRIC})
_BY_METRIC = _models({name: _ALL[name] for name in _ALL if name in _NEED_A_METRIC}, base=MetricSpec)
_COMBINED = _models({name: _ALL[name] for name in _ALL if name in _COMBINE}, {LRScheduler: union(_SINGLE)})

SCHEDULERS: dict[str, type[SchedulerSpec]] = {**_SINGLE, **_BY_METRIC, **_COMBINED}
"""type -> its model. Those that take a function (LambdaLR) are left out; those that combine take timed ones."""

if TYPE_CHECKING:
    AnyScheduler = SchedulerSpec
else:
    AnyScheduler = union(SCHEDULERS)
