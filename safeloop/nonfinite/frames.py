"""The user's own line that is running right now."""

from __future__ import annotations

import sys
from functools import lru_cache
from types import FrameType

from safeloop.autograd.sites import code_name
from safeloop.checks.source import Place, is_user_code

_ENGINE = "_engine_run_backward"
"""The function of torch that runs a backward pass: what called it made no operation of that pass"""


def user_place(top: FrameType | None = None, skip: int = 1) -> Place | None:
    """The innermost line of user code on the stack; None where there is none.

    Args:
        top: a frame at which to stop: what stands above it only started the run.
        skip: how many frames to leave out, this one not counted.
    """
    frame: FrameType | None = sys._getframe(skip)
    while frame is not None and frame is not top and frame.f_code.co_name != _ENGINE:
        if _is_user_file(frame.f_code.co_filename) and is_user_code(frame):
            return Place(frame.f_code.co_filename, frame.f_lineno, code_name(frame.f_code))
        frame = frame.f_back
    return None


@lru_cache(maxsize=4096)
def _is_user_file(path: str) -> bool:
    """Whether a file may hold user code: the cheap part of the question, asked once for each file."""
    return not path.startswith("<") and "/torch/" not in path.replace("\\", "/")
