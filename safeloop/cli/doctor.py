"""`safeloop doctor RUN`: read the folder of a run and rank what looks wrong, without importing torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from safeloop.cli.ending import endings
from safeloop.cli.terminal import out
from safeloop.doctor import diagnose, read_run
from safeloop.faults import printable

_SERIOUS = 3


def doctor(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Rank what looks wrong in a run: finished, running or killed. Ends with 3 where something is serious."""
    with endings(as_json=as_json):
        diagnosis = diagnose(read_run(run))
        out(json.dumps(diagnosis.as_json(), allow_nan=False) if as_json else printable(str(diagnosis)))
        if diagnosis.is_serious:
            raise typer.Exit(_SERIOUS)
