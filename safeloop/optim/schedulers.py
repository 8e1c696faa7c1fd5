"""Learning rate schedules as config: a discriminated union by `type`, generated from torch's signatures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import create_model
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from safeloop.component import Component
from safeloop.signatures import arguments, family, union


class SchedulerSpec(Component):
    """A learning rate schedule of torch; it moves once per step of its optimizer."""

    keeps_foreign_defaults: ClassVar[bool] = True
    torch_class: ClassVar[type[LRScheduler]]

    type: str

    def arguments(self) -> dict[str, Any]:
        """The arguments that were written; torch's defaults stay torch's."""
        return {name: getattr(self, name) for name in sorted(self.model_fields_set - {"type"})}

    def build(self, optimizer: Optimizer) -> LRScheduler:
        """The torch scheduler over an optimizer, whose learning rates it may change at once."""
        given = self.arguments()
        if "schedulers" in given:
            given["schedulers"] = [inner.build(optimizer) for inner in given["schedulers"]]
        make: Any = self.torch_class
        scheduler: LRScheduler = make(optimizer=optimizer, **given)
        return scheduler


_NEED_A_METRIC = frozenset({"ReduceLROnPlateau"})
_COMBINE = frozenset({"SequentialLR", "ChainedScheduler"})


def _models(names_of: dict[str, type[Any]], meanings: dict[Any, Any] | None = None) -> dict[str, type[SchedulerSpec]]:
    models: dict[str, type[SchedulerSpec]] = {}
    for name, cls in names_of.items():
        found = arguments(cls, meanings)
        if found is None:
            continue
        fields: dict[str, Any] = {"type": (Literal[name], name)}
        fields |= {argument: one.field() for argument, one in found.items()}
        models[name] = create_model(f"{name}Spec", __base__=SchedulerSpec, __module__=__name__, **fields)
        models[name].__doc__ = f"torch.optim.lr_scheduler.{name}"
        models[name].torch_class = cls
    return models


_ALL = family(lr_scheduler, LRScheduler, _NEED_A_METRIC)
_SINGLE = _models({name: cls for name, cls in _ALL.items() if name not in _COMBINE})
_COMBINED = _models({name: _ALL[name] for name in _ALL if name in _COMBINE}, {LRScheduler: union(_SINGLE)})

SCHEDULERS: dict[str, type[SchedulerSpec]] = {**_SINGLE, **_COMBINED}
"""type -> its model. Those that take a function (LambdaLR) or a metric (ReduceLROnPlateau) are left out."""

if TYPE_CHECKING:
    AnyScheduler = SchedulerSpec
else:
    AnyScheduler = union(SCHEDULERS)
