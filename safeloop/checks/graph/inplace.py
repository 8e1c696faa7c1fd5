"""Lines and modules of the user's that write into tensors in place: the suspects where a saved tensor was changed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from types import FunctionType

from torch import nn

from safeloop.checks.source import Place, function_node

_HARMLESS = frozenset({"requires_grad_", "retain_grad_", "share_memory_", "register_hook_"})


def lines_that_write(model: nn.Module, terms_source: str) -> list[Place]:
    """Lines of the loss function and of the model's forward methods that write in place; not those of torch itself."""
    sources = [terms_source, *_forwards(model)]
    places = [place for source in dict.fromkeys(sources) for place in _writes(source)]
    return list(dict.fromkeys(places))


def modules_that_write(model: nn.Module) -> list[str]:
    """Names and classes of the modules with `inplace=True`."""
    found = ((name, module) for name, module in model.named_modules() if getattr(module, "inplace", False) is True)
    return [f"`{name}` ({type(module).__name__})" for name, module in found]


def _forwards(model: nn.Module) -> Iterator[str]:
    for cls in dict.fromkeys(type(module) for module in model.modules()):
        forward = cls.forward
        if isinstance(forward, FunctionType) and not (forward.__module__ or "").startswith("torch."):
            yield f"{forward.__code__.co_filename}:{forward.__code__.co_firstlineno} in {forward.__qualname__}"


def _writes(source: str) -> Iterator[Place]:
    found = function_node(source)
    if found is None:
        return
    path, function = found
    name = source.rpartition(" in ")[2] if " in " in source else ""
    lines = {node.lineno for node in ast.walk(function) if isinstance(node, ast.expr | ast.stmt) and _is_write(node)}
    yield from (Place(path, line, name) for line in sorted(lines))


def _is_write(node: ast.AST) -> bool:
    if isinstance(node, ast.AugAssign):
        return True
    if isinstance(node, ast.Assign):
        return any(
            (isinstance(t, ast.Subscript) and not _is_key(t.slice))
            or (isinstance(t, ast.Attribute) and t.attr == "data")
            for t in node.targets
        )
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        name = node.func.attr
        return name.endswith("_") and not name.startswith("_") and name not in _HARMLESS
    return False


def _is_key(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
