"""The user's own code behind a fault: places as `file:line`, frames of a traceback, lines of a loss function."""

from __future__ import annotations

import ast
import inspect
import linecache
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

from safeloop.autograd.sites import SAFELOOP, Site, code_name
from safeloop.autograd.sites import is_user_code as _is_user_code

_SOURCE = re.compile(r"^(?P<path>.+):(?P<line>\d+)(?: in (?P<name>.+))?$")
_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


@dataclass(frozen=True)
class Place:
    """A line of source code, as a fault shows it."""

    path: str
    line: int
    name: str = ""

    @property
    def text(self) -> str:
        """The source line without its indentation; empty where the file cannot be read."""
        linecache.checkcache(self.path)  # the file may have changed since Python read it last: a notebook, an editor
        return linecache.getline(self.path, self.line).strip()

    def __str__(self) -> str:
        name = f" in {self.name}" if self.name else ""
        text = f": `{self.text}`" if self.text else ""
        return f"{shown_path(self.path)}:{self.line}{name}{text}"


def at(site: Site | None, otherwise: str) -> str:
    """`path:line in name: `source`` of a site, or other words where it is not known."""
    return otherwise if site is None else str(Place(*site))


def shown_path(path: str) -> str:
    """`path` relative to the current directory where it lies below it."""
    full, here = os.path.abspath(path), os.getcwd() + os.sep
    return full[len(here) :] if full.startswith(here) else path


def place_of(site: Site | None) -> Place | None:
    """The place of a site that was noted while the code ran."""
    return None if site is None else Place(*site)


def where_defined(function: object) -> str:
    """`path:line in name` of a function of the user's; empty for what was not written in Python."""
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    return "" if code is None else f"{shown_path(code.co_filename)}:{code.co_firstlineno} in {code_name(code)}"


def frames(traceback: TracebackType | None) -> Iterator[tuple[FrameType, int]]:
    """The frames of a traceback with their line numbers, outermost first."""
    while traceback is not None:
        yield traceback.tb_frame, traceback.tb_lineno
        traceback = traceback.tb_next


def user_frame(traceback: TracebackType | None) -> tuple[FrameType, Place] | None:
    """The innermost frame outside torch and safeloop that ran *below* safeloop, and its place.

    A frame above safeloop is the script that started the run: it says nothing about the error, so it counts only
    where no frame of safeloop is in the traceback at all (a loop of the user's own).
    """
    found: tuple[FrameType, int] | None = None
    for frame, line in frames(traceback):
        if is_user_code(frame):
            found = frame, line
        elif _is_ours(frame) and frame.f_code.co_name != "__torch_function__":  # a tape stands below the user's line
            found = found if found is not None and _ran_below_safeloop(found[0]) else None
    if found is None:
        return None
    code = found[0].f_code
    return found[0], Place(code.co_filename, found[1], code_name(code))


def calling_place() -> Place | None:
    """The nearest place outside torch and safeloop on the way to this call; None where there is none."""
    frame = inspect.currentframe()
    while frame is not None and not is_user_code(frame):
        frame = frame.f_back
    return None if frame is None else Place(frame.f_code.co_filename, frame.f_lineno, code_name(frame.f_code))


def is_user_code(frame: FrameType) -> bool:
    """Whether a frame runs code that is neither torch's nor safeloop's nor Python's own."""
    return _is_user_code(frame.f_code)


def _is_ours(frame: FrameType) -> bool:
    return os.path.abspath(frame.f_code.co_filename).startswith(SAFELOOP)


def _ran_below_safeloop(frame: FrameType) -> bool:
    above = frame.f_back
    while above is not None and not _is_ours(above):
        above = above.f_back
    return above is not None


def function_node(source: str) -> tuple[str, _Function] | None:
    """The path and syntax tree of the function at `source` (`path:line in name`); None where it cannot be read."""
    match = _SOURCE.match(source)
    if match is None:
        return None
    path, line = match["path"], int(match["line"])
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None
    found = [node for node in ast.walk(tree) if isinstance(node, _Function) and _starts_at(node, line)]
    return (path, found[0]) if found else None


def _starts_at(node: _Function, line: int) -> bool:
    decorators = [] if isinstance(node, ast.Lambda) else node.decorator_list
    return min([node.lineno, *(d.lineno for d in decorators)]) <= line <= node.lineno


def term_lines(source: str, term: str) -> tuple[Place, ...]:
    """The lines of the loss function at `source` that make and return the term, in order; empty where unknown."""
    found = function_node(source)
    if found is None:
        return ()
    path, function = found
    if isinstance(function, ast.Lambda):
        return (Place(path, function.body.lineno),)
    lines: set[int] = set()
    statements = list(_own_statements(function))
    for statement in statements:
        if isinstance(statement, ast.Return) and statement.value is not None:
            lines |= _lines_of(statement.value, term, statements)
    return tuple(Place(path, line) for line in sorted(lines))


def _own_statements(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[ast.stmt]:
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            continue
        if isinstance(node, ast.stmt):
            yield node
        waiting.extend(ast.iter_child_nodes(node))


def _lines_of(value: ast.expr, term: str, statements: list[ast.stmt]) -> set[int]:
    if isinstance(value, ast.Dict):
        entries = [
            v for k, v in zip(value.keys, value.values, strict=True) if isinstance(k, ast.Constant) and k.value == term
        ]
        return set().union(*(_lines_of(entry, term, statements) for entry in entries)) if entries else set()
    lines = {value.lineno}
    if isinstance(value, ast.Name):
        lines |= {s.lineno for s in statements if any(_assigns(t, value.id, term) for t in _targets(s))}
    return lines


def _targets(statement: ast.stmt) -> list[ast.expr]:
    if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict) and not statement.value.keys:
        return []
    if isinstance(statement, ast.Assign):
        return statement.targets
    return [statement.target] if isinstance(statement, ast.AugAssign | ast.AnnAssign) else []


def _assigns(target: ast.expr, name: str, term: str) -> bool:
    if isinstance(target, ast.Subscript):
        same = isinstance(target.value, ast.Name) and target.value.id == name
        return same and isinstance(target.slice, ast.Constant) and target.slice.value == term
    if isinstance(target, ast.Tuple):
        return any(_assigns(element, name, term) for element in target.elts)
    return isinstance(target, ast.Name) and target.id == name
