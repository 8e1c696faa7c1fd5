"""`safeloop check CONFIG`: everything that can be known before the first step."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from safeloop.cli.ending import endings
from safeloop.cli.options import AllowModule, Config, Overrides, load_config
from safeloop.cli.terminal import err, out, summary
from safeloop.faults import FaultError


def check(
    config: Config,
    overrides: Overrides = None,
    allow_module: AllowModule = None,
    show_origin: Annotated[
        bool, typer.Option("--show-origin", help="Print each value and where it comes from.")
    ] = False,
    accumulation: Annotated[
        bool,
        typer.Option("--accumulation", help="Compare gradients of the first window with those of one big batch."),
    ] = False,
) -> None:
    """Validate the config, build the run and probe it on one batch, without training."""
    with endings():
        loaded = load_config(config, overrides, allow_module)
        if show_origin:
            from safeloop.config import origin_text

            out(origin_text(loaded))
        from safeloop.trainer import trainer_class

        trainer = trainer_class(loaded)(loaded)
        faults = trainer.check()
        if faults:
            err("\n\n".join(map(str, faults)))
        if accumulation:
            report = trainer.check_accumulation()
            out(str(report))
            if report.faults:
                raise FaultError(report.faults[0], report.faults[1:])
        out(Text.assemble(("ok", "bold green"), f"  {config}", f"  (warnings: {summary(faults)})" if faults else ""))
