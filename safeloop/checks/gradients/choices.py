"""Whether a path was cut by choice: by a grad mode or a detach that the user's code switches by a condition."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from safeloop.autograd.sites import Site

_OFF = ("no_grad", "inference_mode")
_ABOUT_TRAINING = re.compile(
    r"freez|froz|thaw|grad|tun(e|ing)|train(able)?_|_train|detach|stop|warm|updates|step|epoch|iter|phase|stage|probe|"
    r"fix|learn|backprop|extract|lock",
    re.I,
)
_ASKS_THE_MODE = re.compile(r"\bis_grad_enabled\b")
_NO_SWITCH = re.compile(r"\bNone\b|isinstance|__name__|\bself\.training\b")
_ORDERS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def is_chosen(sites: Sequence[Site], cut: str) -> bool:
    """Whether the nearest thing that cuts the path is under a condition, as in gradual thawing.

    Args:
        sites: the user's lines that were running, innermost first.
        cut: the function that was called there.
    """
    if cut in ("detach", "detach_"):
        around = _around(sites[0]) if sites else []
        return bool(around) and _is_detached_by_choice(around)
    for site in sites:
        verdict = _switch(_around(site))
        if verdict is not None:
            return verdict
    return False


def _switch(around: Sequence[ast.AST]) -> bool | None:
    """Whether the innermost switch of the grad mode around a line is under a condition; None where there is none."""
    for i, node in enumerate(around):
        if isinstance(node, _Function):
            return False if any(_names(d, _OFF) for d in node.decorator_list) else None
        if not isinstance(node, ast.With | ast.AsyncWith):
            continue
        for item in node.items:
            if _is_conditional(item.context_expr, around):
                return True
            if _names(item.context_expr, _OFF):
                return _is_under_a_choice(around[i + 1 :], around)
    return None


def _is_conditional(context: ast.expr, around: Sequence[ast.AST]) -> bool:
    """Whether a context is no_grad or not: `no_grad() if frozen else nullcontext()`, `set_grad_enabled(tuned)`."""
    if isinstance(context, ast.Name):
        return any(_is_conditional(v, around) for v in _values_of(context.id, around) if not isinstance(v, ast.Name))
    choices = [node for node in ast.walk(context) if isinstance(node, ast.IfExp) and _names(node, _OFF)]
    if isinstance(context, ast.Call) and _names(context.func, ("set_grad_enabled",)):
        return any(_is_about_training(argument, around) for argument in context.args)
    return any(_is_about_training(choice.test, around) for choice in choices)


def _is_about_training(test: ast.expr, around: Sequence[ast.AST]) -> bool:
    """Whether a condition is, by its names and those that it was made of, one about what is trained when."""
    if any(isinstance(op, _ORDERS) for node in ast.walk(test) if isinstance(node, ast.Compare) for op in node.ops):
        return True  # a count that passes a limit: from then on it is trained
    names = [node.id for node in ast.walk(test) if isinstance(node, ast.Name)]
    texts = [ast.unparse(value) for value in (test, *(v for name in names for v in _values_of(name, around)))]
    texts = [_ASKS_THE_MODE.sub("", text) for text in texts]  # `flag and torch.is_grad_enabled()` is about the flag
    return not _NO_SWITCH.search(texts[0]) and any(_ABOUT_TRAINING.search(text) for text in texts)


def _values_of(name: str, around: Sequence[ast.AST]) -> Iterator[ast.expr]:
    """What a local variable is set to in the function around."""
    for node in ast.walk(around[-1]):
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            yield node.value


def _is_detached_by_choice(around: Sequence[ast.AST]) -> bool:
    inner = [node for node in ast.walk(around[0]) if isinstance(node, ast.IfExp) and _names(node, ("detach",))]
    return any(_is_about_training(choice.test, around) for choice in inner) or _is_under_a_choice(around[1:], around)


def _is_under_a_choice(outside: Sequence[ast.AST], around: Sequence[ast.AST]) -> bool:
    """Whether the next thing outside is an `if` about what is trained when."""
    for node in outside:
        if isinstance(node, ast.If):
            return _is_about_training(node.test, around)
        if not isinstance(node, ast.With | ast.AsyncWith):
            return False
    return False


def _names(node: ast.AST, names: Sequence[str]) -> bool:
    return any(
        (isinstance(n, ast.Attribute) and n.attr in names) or (isinstance(n, ast.Name) and n.id in names)
        for n in ast.walk(node)
    )


def _around(site: Site) -> list[ast.AST]:
    """The statements that a line lies in, innermost first, up to its function."""
    found: list[ast.AST] = []
    waiting: list[ast.AST] = [_tree(site.path)]
    while waiting:
        node = waiting.pop()
        lines = [n.lineno for n in getattr(node, "decorator_list", ())]
        first, last = min([getattr(node, "lineno", 0), *lines]), getattr(node, "end_lineno", None) or site.line
        if first <= site.line <= last:
            if isinstance(node, ast.stmt | ast.Module):
                found.append(node)
            waiting = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
            waiting += list(getattr(node, "handlers", ()))
            waiting += list(getattr(node, "cases", ()))
    inner = found[::-1]
    end = next((i for i, node in enumerate(inner) if isinstance(node, _Function)), len(inner) - 1)
    return inner[: end + 1]


@lru_cache(maxsize=16)
def _tree(path: str) -> ast.Module:
    try:
        return ast.parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return ast.Module([], [])
