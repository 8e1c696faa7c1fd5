"""How a command ends: every failure becomes text (or one JSON object) on stderr and an exit code."""

from __future__ import annotations

import dataclasses
import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import NoReturn

import typer

from safeloop.cli.terminal import err
from safeloop.faults import FaultError

_HERE = Path(__file__).parent


class Exit(IntEnum):
    """Exit codes that no fault decides; a fault's own is `FaultError.exit_code`."""

    EXCEPTION = 1
    USAGE = 2
    ENVIRONMENT = 6
    INTERRUPTED = 130


@contextmanager
def endings(*, as_json: bool = False) -> Iterator[None]:
    """Turns what the body raises into the command's end.

    A `FaultError` is printed and ends with its exit code; an exception of the user's code keeps its traceback and ends
    with 1; Ctrl-C ends with 130.
    """
    try:
        yield
    except FaultError as error:
        _end_in_fault(error, as_json=as_json)
    except (BrokenPipeError, typer.Exit):
        raise
    except KeyboardInterrupt:
        err(json.dumps({"error": {"type": "KeyboardInterrupt"}}) if as_json else "interrupted")
        raise typer.Exit(Exit.INTERRUPTED) from None
    except Exception as error:
        _end_in_exception(error, as_json=as_json)


def _end_in_fault(error: FaultError, *, as_json: bool) -> NoReturn:
    if as_json:
        others = [dataclasses.asdict(fault) for fault in error.others]
        err(json.dumps({"error": dataclasses.asdict(error.fault), "others": others}))
    else:
        err(str(error))
    raise typer.Exit(error.exit_code) from None


def _end_in_exception(error: Exception, *, as_json: bool) -> NoReturn:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None and Path(trace.tb_frame.f_code.co_filename).parent == _HERE:
        trace = trace.tb_next
    lines = "".join(traceback.format_exception(type(error), error, trace)).rstrip()
    if as_json:
        err(json.dumps({"error": {"type": type(error).__name__, "what": str(error), "traceback": lines}}))
    else:
        err(lines)
    raise typer.Exit(Exit.EXCEPTION) from None
