"""`safeloop replay BUNDLE`: run a saved step again, and print where its NaN or infinity was born, or how it failed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from safeloop.cli.ending import endings
from safeloop.cli.options import AllowModule
from safeloop.cli.terminal import out


def replay(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="A folder `bundles/step-N` of a run.", show_default=False)
    ],
    allow_module: AllowModule = None,
) -> None:
    """Run a step that failed, or that ended in NaN or infinity, again, and print the diagnosis."""
    with endings():
        if (here := str(Path.cwd())) not in sys.path:
            sys.path.append(here)
        from safeloop.replay import replay as run_again

        out(str(run_again(bundle, allow_modules=allow_module or ())))
