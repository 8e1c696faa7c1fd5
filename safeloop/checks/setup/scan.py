"""What a model keeps in plain Python attributes, where `parameters()`, `state_dict()` and `.to()` do not look."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from safeloop.checks.setup.helpers import held_by, is_helper
from safeloop.checks.setup.roles import is_kept_out
from safeloop.checks.setup.stores import forward_reads

_OF_TORCH = frozenset(vars(nn.Module()))
_DEPTH = 3
"""levels of containers in containers"""


@dataclass(frozen=True)
class Attribute:
    """A tensor kept as an attribute of a module, or one level deep in a list, tuple or dict that is an attribute."""

    module: nn.Module
    path: str
    """full name, as a parameter's would be: `encoder.scale`; `encoder.scales[2]` in a container"""
    attribute: str
    tensor: Tensor

    def __str__(self) -> str:
        return f"attribute `{self.path}` of {type(self.module).__name__}"


@dataclass(frozen=True)
class Container:
    """Modules kept in a list, tuple or dict that is an attribute of a module."""

    module: nn.Module
    path: str
    attribute: str
    kind: str
    modules: tuple[nn.Module, ...]


def tensor_attributes(model: nn.Module) -> Iterator[Attribute]:
    """Every tensor in a plain attribute of the model's modules; not its parameters and buffers."""
    for prefix, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute in _OF_TORCH:
                continue
            path = _joined(prefix, attribute)
            if isinstance(value, Tensor):
                yield Attribute(module, path, attribute, value)
            else:
                for key, item in items_of(value):
                    if isinstance(item, Tensor):
                        yield Attribute(module, f"{path}[{key!r}]", attribute, item)


def leaf_attributes(model: nn.Module) -> Iterator[Attribute]:
    """Every tensor that is meant to train, in a plain attribute: also in nested containers and in helper objects."""
    for prefix, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute in _OF_TORCH:
                continue
            path = _joined(prefix, attribute)
            for inner, item in (("", value), *_nested(value, _DEPTH), *_held_tensors(module, attribute, value)):
                if isinstance(item, Tensor) and item.is_leaf and item.requires_grad:
                    yield Attribute(module, path + inner, attribute, item)


def buffer_attributes(model: nn.Module) -> Iterator[Attribute]:
    """Every buffer of the model's modules."""
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield Attribute(module, _joined(prefix, name), name, buffer)


def module_containers(model: nn.Module) -> Iterator[Container]:
    """Every list, tuple or dict of modules, nested or not, that is an attribute of the model's modules."""
    for prefix, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in _OF_TORCH and (found := modules_in(value)):
                yield Container(module, _joined(prefix, attribute), attribute, type(value).__name__, found)


def unregistered(model: nn.Module) -> Mapping[Tensor, str]:
    """Tensors that the model uses but does not list as parameters -> the attribute that keeps them."""
    found = {attribute.tensor: attribute.path for attribute in (*tensor_attributes(model), *leaf_attributes(model))}
    for container in module_containers(model):
        found.update({p: container.path for module in container.modules for p in module.parameters()})
    return found


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def items_of(value: Any) -> Iterator[tuple[Any, Any]]:
    """Keys and items of a list, tuple, deque, set or mapping; nothing for anything else."""
    if isinstance(value, list | tuple | deque | set | frozenset):
        yield from enumerate(value)
    elif isinstance(value, Mapping):
        yield from value.items()


def modules_in(value: Any) -> tuple[nn.Module, ...]:
    """The modules in a container, nested or not."""
    return tuple(item for _, item in _nested(value, _DEPTH) if isinstance(item, nn.Module))


def _nested(value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    for key, item in items_of(value):
        yield f"[{key!r}]", item
        if depth:
            yield from ((f"[{key!r}]{inner}", found) for inner, found in _nested(item, depth - 1))


def _held_tensors(module: nn.Module, attribute: str, value: Any) -> Iterator[tuple[str, Any]]:
    if is_helper(value) and not is_kept_out(attribute) and attribute in forward_reads(module):
        for name, item in held_by(value).items():
            yield f".{name}", item
            yield from ((f".{name}{inner}", found) for inner, found in _nested(item, 0))
