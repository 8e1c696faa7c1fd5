"""The direct path: the fused kernel of Adam, AdamW and SGD on cached lists, without the Python around it.

`Optimizer.step` gathers its lists, groups them by device and looks for hooks at every step; on a small model that
costs several
times the kernel. A loop that owns the optimizer knows all of it beforehand. The state is the optimizer's own, so
that its `state_dict` stays true, and whatever does not fit (a missing gradient, a hook, replaced state) takes
`optimizer.step()`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from safeloop.autograd.norms import are_uniform
from safeloop.optim.permit import Permit

Kernel = Callable[["_Group", "list[Tensor]", "Tensor | None"], None]


@dataclass(frozen=True, slots=True)
class _Group:
    """One param group with its state as lists."""

    options: dict[str, Any]
    tensors: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    largest: list[Tensor]
    steps: list[Tensor]


def _adam(group: _Group, gradients: list[Tensor], found_inf: Tensor | None) -> None:
    _adaptive(torch._fused_adam_, group, gradients, found_inf)


def _adamw(group: _Group, gradients: list[Tensor], found_inf: Tensor | None) -> None:
    _adaptive(torch._fused_adamw_, group, gradients, found_inf)


def _adaptive(kernel: Any, group: _Group, gradients: list[Tensor], found_inf: Tensor | None) -> None:
    options = group.options
    beta1, beta2 = options["betas"]
    torch._foreach_add_(group.steps, 1)
    kernel(
        group.tensors,
        gradients,
        group.first,
        group.second,
        group.largest,
        group.steps,
        lr=options["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=options["weight_decay"],
        eps=options["eps"],
        amsgrad=options["amsgrad"],
        maximize=options["maximize"],
        grad_scale=None,
        found_inf=found_inf,
    )
    if found_inf is not None:
        torch._foreach_sub_(group.steps, [found_inf] * len(group.steps))


def _sgd(group: _Group, gradients: list[Tensor], found_inf: Tensor | None) -> None:
    options = group.options
    torch._fused_sgd_(
        group.tensors,
        gradients,
        group.first,
        weight_decay=options["weight_decay"],
        momentum=options["momentum"],
        lr=options["lr"],
        dampening=options["dampening"],
        nesterov=options["nesterov"],
        maximize=options["maximize"],
        is_first_step=False,
        grad_scale=None,
        found_inf=found_inf,
    )


_KERNELS: Mapping[type[Optimizer], Kernel] = {Adam: _adam, AdamW: _adamw, SGD: _sgd}


class DirectUpdate:
    """Updates what one optimizer owns; bitwise the same as its `step()`. Made by `direct_update`."""

    def __init__(self, optimizer: Optimizer, permit: Permit | None = None) -> None:
        self.optimizer = optimizer
        self._permit = permit or Permit("", optimizer)
        self._kernel = _KERNELS[type(optimizer)]
        self._groups: list[_Group] = []
        self._state: Any = None
        self._size = 0

    def __call__(self, gradients: list[Tensor]) -> None:
        """One update. `gradients` are those that exist, in the order of the param groups."""
        if not self._groups or len(gradients) != self._size or not self._fits():
            begin_late(self.optimizer)
            self._permit.step()
            self._gather(gradients)
            return
        found_inf = getattr(self.optimizer, "found_inf", None)
        start = 0
        with torch.no_grad():
            for group in self._groups:
                end = start + len(group.tensors)
                self._kernel(group, gradients[start:end], found_inf)
                start = end

    def _fits(self) -> bool:
        optimizer = self.optimizer
        return (
            self._state is optimizer.state.get(self._groups[0].tensors[0])
            and self._permit.is_all_that_hooks(optimizer._optimizer_step_pre_hooks)
            and not optimizer._optimizer_step_post_hooks
            and not _global_optimizer_pre_hooks
            and not _global_optimizer_post_hooks
        )

    def _gather(self, gradients: Sequence[Tensor]) -> None:
        """Cache the lists, now that `step()` has made the state; not while a gradient is missing or unusual."""
        self._groups, self._size = [], 0
        tensors = [tensor for group in self.optimizer.param_groups for tensor in group["params"]]
        if len(gradients) != len(tensors) or not are_uniform([*tensors, *gradients]):
            return
        if any(isinstance(group["lr"], Tensor) for group in self.optimizer.param_groups):
            return
        self._groups = [self._lists(group) for group in self.optimizer.param_groups if group["params"]]
        self._state = self.optimizer.state.get(tensors[0])
        self._size = len(tensors)

    def _lists(self, group: dict[str, Any]) -> _Group:
        states = [self.optimizer.state.get(tensor, {}) for tensor in group["params"]]

        def column(name: str) -> list[Tensor]:
            return [state[name] for state in states if isinstance(state.get(name), Tensor)]

        first = column("exp_avg") or (column("momentum_buffer") if group.get("momentum") else [])
        second, largest, steps = column("exp_avg_sq"), column("max_exp_avg_sq"), column("step")
        return _Group(group, list(group["params"]), first, second, largest, steps)


def begin_late(optimizer: Optimizer) -> None:
    """Give parameters of a fused SGD that have their first gradient now, later than others, a momentum of zero.

    torch's own fused SGD takes all buffers or none. From zero, momentum begins as in the other kernels, but with
    `dampening`, which is left to torch.
    """
    if not isinstance(optimizer, SGD):
        return
    for group in optimizer.param_groups:
        if not group.get("fused") or not group["momentum"] or group["dampening"]:
            continue
        tensors = [tensor for tensor in group["params"] if tensor.grad is not None]
        missing = [tensor for tensor in tensors if optimizer.state[tensor].get("momentum_buffer") is None]
        if len(missing) < len(tensors):
            for tensor in missing:
                optimizer.state[tensor]["momentum_buffer"] = torch.zeros_like(tensor)


def direct_update(optimizer: Optimizer, permit: Permit | None = None) -> DirectUpdate | None:
    """The direct path of an optimizer, or None where it has none; `permit` calls its `step()` where that is needed.

    It has one where its class is exactly `Adam`, `AdamW` or `SGD`, every group is fused and nothing unusual is
    switched on, and where a trial on one element gives the bits of `optimizer.step()` with this version of torch.
    """
    if type(optimizer) not in _KERNELS or not all(_is_usual(group) for group in optimizer.param_groups):
        return None
    is_same = all(_trial(type(optimizer), group) for group in optimizer.param_groups)
    return DirectUpdate(optimizer, permit) if is_same else None


def _is_usual(group: Mapping[str, Any]) -> bool:
    unusual = any(group.get(name) for name in ("capturable", "differentiable", "foreach"))
    return bool(group.get("fused")) and not unusual and not isinstance(group["lr"], Tensor)


def _trial(kind: type[Optimizer], group: Mapping[str, Any]) -> bool:
    """Whether three updates of one element agree bitwise with `step()`."""
    options = {
        name: value
        for name, value in group.items()
        if name not in ("params", "initial_lr", "param_names", "decoupled_weight_decay")
    }
    device = group["params"][0].device if group["params"] else torch.device("cpu")
    ours, theirs = (torch.full((1,), 0.7, device=device, requires_grad=True) for _ in range(2))
    make: Any = kind
    try:
        direct, reference = DirectUpdate(make([ours], **options)), make([theirs], **options)
        for gradient in (0.3, -1.7, 0.01):
            ours.grad, theirs.grad = torch.full_like(ours, gradient), torch.full_like(theirs, gradient)
            direct([ours.grad])
            reference.step()
    except (TypeError, RuntimeError, AttributeError):
        return False
    return torch.equal(ours, theirs)
