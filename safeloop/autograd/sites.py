"""Where in the user's code something happens: the innermost frame outside torch and safeloop."""

from __future__ import annotations

import itertools
import linecache
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

import torch

TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
SAFELOOP = str(Path(__file__).resolve().parents[1]) + os.sep
_STDLIB = sysconfig.get_path("stdlib") + os.sep
_TYPED_IN = ("<stdin>", "<ipython", "<python-input")

_is_user: dict[CodeType, bool] = {}
"""Whether a code object is the user's; files do not change sides, so the answer is kept."""


class Site(NamedTuple):
    """A line of the user's code."""

    path: str
    line: int
    name: str
    """the qualified name of the function"""


def is_user_code(code: CodeType) -> bool:
    """Whether a code object comes from a file, or a prompt, that is neither torch's nor safeloop's nor Python's own."""
    known = _is_user.get(code)
    if known is None:
        known = _is_user[code] = is_user_file(code.co_filename)
    return known


def is_user_file(name: str) -> bool:
    """Whether a file, or a prompt, is neither torch's nor safeloop's nor Python's own."""
    if name.startswith("<"):
        return name.startswith(_TYPED_IN)
    path = os.path.abspath(name)
    if path.startswith((TORCH, SAFELOOP)):
        return False
    return not path.startswith(_STDLIB) or "site-packages" in path


def code_name(code: CodeType) -> str:
    """The qualified name of a code object (its plain name before Python 3.11)."""
    return str(getattr(code, "co_qualname", code.co_name)).replace(".<locals>", "")


def user_frame(depth: int = 1) -> FrameType | None:
    """The innermost frame of the user's, from the caller's `depth`-th frame up; None where there is none."""
    frame: FrameType | None = sys._getframe(depth)
    while frame is not None and not is_user_code(frame.f_code):
        frame = frame.f_back
    return frame


def site_of(frame: FrameType) -> Site:
    """The line that a frame is on."""
    return Site(frame.f_code.co_filename, frame.f_lineno, code_name(frame.f_code))


def sites_above(frame: FrameType, most: int = 6) -> Iterator[Site]:
    """The user's lines that have called a frame, the nearest first."""
    above = frame.f_back
    while above is not None and most:
        if is_user_code(above.f_code):
            most -= 1
            yield site_of(above)
        above = above.f_back


def user_code() -> tuple[CodeType, int] | None:
    """The user's code that is running, and its line, as cheap as can be: about 1 us."""
    frame = user_frame(2)
    return None if frame is None else (frame.f_code, frame.f_lineno)


def code_site(found: tuple[CodeType, int]) -> Site:
    """The site that `user_code` has found."""
    code, line = found
    return Site(code.co_filename, line, code_name(code))


def user_site() -> Site | None:
    """The line of the user's that is running; None in a thread of the autograd engine."""
    frame = user_frame(2)
    return None if frame is None else site_of(frame)


def call_text(frame: FrameType) -> str:
    """The source of the call that a frame is in; before Python 3.11, its line."""
    code, line = frame.f_code, frame.f_lineno
    if not hasattr(code, "co_positions"):
        return linecache.getline(code.co_filename, line)
    position = next(itertools.islice(code.co_positions(), frame.f_lasti // 2, None), (None, None, None, None))
    first, last, start, end = position
    if first is None or last is None:
        return linecache.getline(code.co_filename, line)
    lines = [linecache.getline(code.co_filename, number) for number in range(first, last + 1)]
    return lines[0].encode()[start:end].decode(errors="replace") if first == last else "".join(lines)
