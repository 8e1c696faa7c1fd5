"""`safeloop plan CONFIG`: what a step does, in order."""

from __future__ import annotations

from typing import Annotated

import typer

from safeloop.cli.ending import endings
from safeloop.cli.options import AllowModule, Config, Overrides, load_config
from safeloop.cli.terminal import out


def plan(
    config: Config,
    overrides: Overrides = None,
    allow_module: AllowModule = None,
    why: Annotated[bool, typer.Option("--why", help="Add the reason for each line.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what a step does, in order, after a probe on one batch."""
    with endings(as_json=as_json):
        loaded = load_config(config, overrides, allow_module)
        from safeloop.trainer import trainer_class

        step_plan = trainer_class(loaded)(loaded).plan()
        out(step_plan.json() if as_json else step_plan.why() if why else str(step_plan))
