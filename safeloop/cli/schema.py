"""`safeloop schema`: the JSON schema of a config file, as it ships in the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safeloop.cli.ending import Exit, endings
from safeloop.cli.terminal import err, out
from safeloop.config.schema import shipped_schema


def schema(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write it to a file.", show_default=False)
    ] = None,
) -> None:
    """Print the JSON schema of a config file, for editors."""
    with endings():
        text = shipped_schema()
        if output is None:
            out(text.rstrip("\n"))
            return
        try:
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            err(f"error: cannot write {output}: {error.strerror}")
            raise typer.Exit(Exit.ENVIRONMENT) from None
        out(f"wrote {output}")
