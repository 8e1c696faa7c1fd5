"""Looks at a penalty on the way: before its gradient is taken and after, on the steps that are looked at in depth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from safeloop.autograd.second import dead_ends, nodes_between, obstacles, without_second_derivative
from safeloop.autograd.walk import reach
from safeloop.checks.penalties.gradient import PenaltyWithoutGradient, SamplesCoupled, SecondDerivativeVanishes
from safeloop.checks.penalties.second import OperationWithoutSecondDerivative
from safeloop.checks.wording import listed
from safeloop.faults import Fault, FaultError
from safeloop.penalties.base import Penalty
from safeloop.penalties.gradients import Field

_BATCH_NORM = ("NativeBatchNormBackward", "CudnnBatchNormBackward", "MiopenBatchNormBackward", "BatchNormBackward")


class Inspection:
    """Collects the faults of penalties; reads values from the device, so that it costs a sync.

    Args:
        trained: the parameters that the phase trains.
        model: searched for modules that mix samples; None: their names are not known.
        is_first: whether samples are looked at for coupling, which costs a backward pass.
    """

    def __init__(self, trained: Iterable[Tensor], model: nn.Module | None, *, is_first: bool) -> None:
        self.faults: list[Fault] = []
        self._trained = set(trained)
        self._model = model
        self._is_first = is_first
        self._suspects: list[str] = []

    def taken(self) -> list[Fault]:
        """The faults, errors first, which are then no longer kept."""
        found, self.faults = self.faults, []
        return sorted(found, key=lambda fault: fault.severity != "error")

    def before(self, name: str, penalty: Penalty, field: Field, where: str) -> None:
        """Look at the graph between the values and the point.

        Raises:
            FaultError: SL435, not even a first gradient can be taken.
        """
        nodes = nodes_between(field.values, field.at)
        self._suspects = without_second_derivative(nodes)
        if found := obstacles(nodes):
            self.faults.append(OperationWithoutSecondDerivative.of(name, found, where))
            if any("Checkpoint" in node for node in found):
                raise FaultError(self.faults.pop())
        if self._is_first and penalty.is_per_sample:
            has_norms = any(node.name().startswith(_BATCH_NORM) for node in nodes)
            self._look_for_coupling(name, field, has_norms, where)

    def after(self, name: str, penalty: Penalty, field: Field, value: Tensor, where: str) -> None:
        """Look at the graph of the penalty itself, and whether it is zero for a reason."""
        if ends := dead_ends(value):
            self.faults.append(OperationWithoutSecondDerivative.of(name, self._suspects or ends, where))
            return
        found = reach(value)
        if found.is_complete and self._trained.isdisjoint(found.leaves):
            self.faults.append(_trains_nothing(name, where))
        if penalty.order > 2 and not bool(value.detach().any()) and bool(field.gradient().detach().any()):
            self.faults.append(_zero(name, where))

    def _look_for_coupling(self, name: str, field: Field, has_norms: bool, where: str) -> None:
        modules = _batch_norms(self._model) if has_norms else []
        if field.values.dim() == 0:
            foreign = None
        elif len(field.at) < 2:
            return
        else:
            (rows,) = torch.autograd.grad(
                field.values[0].sum(), field.at, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            foreign = int(rows[1:].detach().flatten(1).any(1).sum()) if rows.dim() > 1 else int(rows[1:].any())
        if foreign or (foreign is None and modules):
            self.faults.append(_coupled(name, foreign, len(field.at), modules, where))


def _batch_norms(model: nn.Module | None) -> list[str]:
    kinds = (nn.modules.batchnorm._NormBase,)
    named = () if model is None else model.named_modules()
    return [
        name
        for name, module in named
        if isinstance(module, kinds)
        and not isinstance(module, nn.modules.instancenorm._InstanceNorm)
        and (module.training or module.running_mean is None)
    ]


def _coupled(name: str, foreign: int | None, count: int, modules: Sequence[str], where: str) -> Fault:
    measured = f": the value of the first sample has a gradient at {foreign} of {count - 1} others" if foreign else ""
    who = f"; in train mode: {listed(modules)}" if modules else ""
    return SamplesCoupled.fault(
        f"`{name}` is of a function that mixes the samples of a batch{measured}{who}",
        where=where,
        why="batch normalisation in train mode makes each value depend on the whole batch"
        if modules
        else "some operation makes each value depend on other samples",
        fix="use LayerNorm, GroupNorm or InstanceNorm in its place, or eval mode; where the mixing is meant, set "
        f'`audit.accept: {{SL436: ["{name}"]}}`',
        names=(name,),
    )


def _trains_nothing(name: str, where: str) -> Fault:
    return PenaltyWithoutGradient.fault(
        f"`{name}` reaches no parameter that this phase trains",
        where=where,
        why="the function belongs to another optimizer, or what it is made of was detached",
        fix="return the penalty from the phase that trains the function",
        names=(name,),
    )


def _zero(name: str, where: str) -> Fault:
    return SecondDerivativeVanishes.fault(
        f"the second derivative of `{name}` is exactly zero at all samples, while the first is not",
        where=where,
        why="the function is linear piece by piece: ReLU, LeakyReLU, max pooling and linear layers have no curvature",
        fix="use a smooth activation: nn.SiLU, nn.GELU, nn.Tanh, nn.Softplus",
        names=(name,),
    )
