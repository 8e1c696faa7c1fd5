"""Regions after which a model and the process are bitwise as before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy as _torch_is_lazy

from safeloop.data.structure import tensors
from safeloop.seeds import isolated_rng


@contextmanager
def preserved(model: nn.Module, *, freeze: bool = False, seed: int | None = None) -> Iterator[None]:
    """A region that may run the model; afterwards, also after an exception, it is bitwise as before.

    That is: the random state, each module's mode, buffers (values and identity), `.grad` (its object, hence its values;
    None inside), `requires_grad`, and the grad mode. `freeze` switches off the parameters' `requires_grad` inside,
    `seed` seeds the random numbers there. Lazy parameters and buffers that take their shapes inside keep them, buffers
    with their initial values. Costs a copy of the buffers.
    """
    grad_mode = torch.is_grad_enabled()
    with ExitStack() as stack:
        stack.callback(torch.set_grad_enabled, grad_mode)
        stack.enter_context(isolated_rng(seed))
        stack.enter_context(_parameters_set_aside(model, freeze))
        stack.enter_context(_buffers_restored(model))
        stack.enter_context(_modes_restored(model))
        yield


@contextmanager
def _modes_restored(model: nn.Module) -> Iterator[None]:
    modes = modes_of(model)
    try:
        yield
    finally:
        for (
            module,
            mode,
        ) in modes:  # an overridden `train` may do more than set the flag: merged adapters come apart again
            if type(module).train is not nn.Module.train and module.training is not mode:
                module.train(mode)
        set_modes(modes)


def modes_of(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Each module with its mode."""
    return [(module, module.training) for module in model.modules()]


def set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    """Give each module its mode back, and nothing to its children."""
    for module, mode in modes:
        if module.training is not mode:
            module.training = mode


@contextmanager
def _parameters_set_aside(model: nn.Module, freeze: bool) -> Iterator[None]:
    """Without `.grad`: nothing inside can write into one."""
    saved = [(p, p.requires_grad, p.grad) for p in model.parameters() if not is_lazy(p)]
    try:
        for parameter, _, _ in saved:
            parameter.grad = None
            if freeze:
                parameter.requires_grad_(False)
        yield
    finally:
        for parameter, requires_grad, grad in saved:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


@dataclass(frozen=True, slots=True)
class _Copy:
    """A buffer's values and version at one moment."""

    buffer: Tensor
    values: Tensor
    version: int

    @classmethod
    def of(cls, buffer: Tensor) -> _Copy:
        return cls(buffer, buffer.detach().clone(), _version(buffer))

    def put_back(self) -> None:
        buffer, values = self.buffer, self.values
        if _version(buffer) == self.version and _is_equal(buffer, values):
            return
        if (buffer.shape, buffer.dtype, buffer.device) == (values.shape, values.dtype, values.device):
            buffer.copy_(values)
        else:
            buffer.data = values


@contextmanager
def _buffers_restored(model: nn.Module) -> Iterator[None]:
    tables = [(module, dict(module._buffers)) for module in model.modules()]
    buffers = {id(buffer): buffer for _, table in tables for buffer in table.values() if buffer is not None}
    copies = [_Copy.of(buffer) for buffer in buffers.values() if not is_lazy(buffer)]
    lazy = [module for module, table in tables if any(is_lazy(buffer) for buffer in table.values())]
    try:
        with _copied_when_shaped(lazy, copies):
            yield
    finally:
        with torch.no_grad():
            for copy in copies:
                copy.put_back()
        for module, table in tables:
            module._buffers.clear()
            module._buffers.update(table)


@contextmanager
def _copied_when_shaped(modules: list[nn.Module], copies: list[_Copy]) -> Iterator[None]:
    """Copy lazy buffers between the moment when they take their shape and the forward that first writes into them."""

    def copy(module: nn.Module, inputs: Any) -> None:
        known = {id(c.buffer) for c in copies}
        copies.extend(_Copy.of(b) for b in module.buffers(recurse=False) if not is_lazy(b) and id(b) not in known)

    handles = [module.register_forward_pre_hook(copy) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def is_lazy(tensor: Any) -> bool:
    """Whether a parameter or buffer has no shape yet."""
    return bool(_torch_is_lazy(tensor))


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _is_equal(tensor: Tensor, copy: Tensor) -> bool:
    """Whether the values are the same: a write through `.data` leaves the version as it was.

    Layouts that cannot be compared go by the version alone.
    """
    if tensor.layout is not torch.strided or tensor.is_meta or torch.equal(tensor, copy):
        return True
    return tensor.shape == copy.shape and bool(((tensor == copy) | (tensor.isnan() & copy.isnan())).all())


@contextmanager
def batch_preserved(batch: Any) -> Iterator[None]:
    """A region that may take gradients with respect to a batch, whose tensors may come again in training.

    `requires_grad` and `.grad` of its leaves are afterwards what they were.
    """
    saved = [(tensor, tensor.requires_grad, tensor.grad) for _, tensor in tensors(batch) if tensor.is_leaf]
    try:
        yield
    finally:
        for tensor, requires_grad, grad in saved:
            tensor.requires_grad_(requires_grad)
            tensor.grad = grad
