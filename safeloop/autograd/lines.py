"""The user's line that is running now, found fast enough to ask for every saved tensor."""

from __future__ import annotations

import linecache
import os
import sys
from pathlib import Path
from types import CodeType
from typing import NamedTuple

import torch

_NOT_THE_USERS = (
    os.path.dirname(os.path.abspath(torch.__file__)) + os.sep,
    str(Path(__file__).resolve().parents[1]) + os.sep,
)
_is_users: dict[str, bool] = {}


class CodeLine(NamedTuple):
    """A line of a running function."""

    path: str
    line: int
    name: str


def user_line() -> CodeLine | None:
    """The innermost line outside torch and safeloop of those that are running; None where there is none.

    In a thread of the autograd engine (on an accelerator) there is none. Cost: about 1 us.
    """
    found = user_code()
    return None if found is None else code_line(found)


def user_code() -> tuple[CodeType, int] | None:
    """As `user_line`, the code object in place of the names."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        is_users = _is_users.get(path)
        if is_users is None:
            is_users = _is_users[path] = _check(path)
        if is_users:
            return frame.f_code, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]
    return None


def code_line(found: tuple[CodeType, int]) -> CodeLine:
    """The line with its path and the function's qualified name (its plain name before Python 3.11)."""
    code, line = found
    return CodeLine(code.co_filename, line, str(getattr(code, "co_qualname", code.co_name)).replace(".<locals>", ""))


def _check(path: str) -> bool:
    """A file, or a cell of a notebook, which is only in Python's line cache."""
    full = os.path.abspath(path)
    return not full.startswith(_NOT_THE_USERS) and (path in linecache.cache or os.path.exists(full))
