"""Modules out of sight that a forward pass uses: in helper objects, closures, partial functions, bound methods."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from safeloop.checks.setup.helpers import held_by, is_helper
from safeloop.checks.setup.roles import is_kept_out
from safeloop.checks.setup.scan import modules_in
from safeloop.checks.setup.stores import forward_reads


@dataclass(frozen=True)
class Holder:
    """Something that `forward` reads and that keeps modules out of sight."""

    module: nn.Module
    path: str
    kind: str
    """`a Tower, no nn.Module`, `a function`"""
    modules: tuple[nn.Module, ...]
    fix: str


def module_holders(model: nn.Module) -> Iterator[Holder]:
    """Every holder in the attributes that some `forward` reads; one that knows the model itself is no part of it."""
    known = set(model.modules())
    for prefix, module in model.named_modules():
        candidates = {name: value for name, value in vars(module).items() if is_helper(value) or _is_function(value)}
        reads = forward_reads(module) if candidates else frozenset()
        for attribute, value in candidates.items():
            if attribute not in reads or is_kept_out(attribute):
                continue
            kept = held_by(value).values() if is_helper(value) else list(_used_by(value))
            modules = tuple(dict.fromkeys(found for item in kept for found in _modules(item)))
            if not modules or known.intersection(modules) or any(isinstance(item, Optimizer) for item in kept):
                continue
            path = f"{prefix}.{attribute}" if prefix else attribute
            yield Holder(module, path, _kind(value), modules, _fix(attribute, value))


def _modules(item: Any) -> tuple[nn.Module, ...]:
    return (item,) if isinstance(item, nn.Module) else modules_in(item)


def _is_function(value: Any) -> bool:
    return isinstance(value, FunctionType | MethodType | functools.partial)


def _used_by(function: Any, depth: int = 2) -> Iterator[Any]:
    """What a function was given when it was made: closure, defaults, bound object, arguments of a partial."""
    if isinstance(function, functools.partial):
        given: list[Any] = [function.func, *function.args, *function.keywords.values()]
    elif isinstance(function, MethodType):
        given = [function.__self__, *(held_by(function.__self__).values() if is_helper(function.__self__) else ())]
    else:
        given = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *_cells(function)]
    for item in given:
        yield item
        if depth and _is_function(item):
            yield from _used_by(item, depth - 1)


def _cells(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a name that is not bound yet
            continue


def _kind(value: Any) -> str:
    if is_helper(value):
        return f"an object of class {type(value).__name__}, no nn.Module"
    return f"a {'function' if isinstance(value, FunctionType) else type(value).__name__}"


def _fix(attribute: str, value: Any) -> str:
    if is_helper(value):
        return (
            f"make {type(value).__name__} a subclass of `nn.Module`, or freeze its modules by `requires_grad_(False)`"
        )
    return (
        f"make the module an attribute of the model, beside `self.{attribute}`, or freeze it by `requires_grad_(False)`"
    )
