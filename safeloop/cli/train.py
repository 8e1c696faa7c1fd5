"""`safeloop train CONFIG`: train, and say where the result is."""

from __future__ import annotations

import dataclasses
import json
import math
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from safeloop.cli.ending import endings
from safeloop.cli.options import AllowModule, Config, Overrides, load_config
from safeloop.cli.terminal import err, out

if TYPE_CHECKING:
    from safeloop.config import Loaded
    from safeloop.outcome import RunResult


class LogFormat(str, Enum):
    """How a run is reported: text for people, one JSON object for machines."""

    TEXT = "text"
    JSON = "json"


def train(
    config: Config,
    overrides: Overrides = None,
    allow_module: AllowModule = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; print the run folder alone.")] = False,
    log_format: Annotated[
        LogFormat, typer.Option(help="`json`: no progress; the result, or the error, is one JSON object.")
    ] = LogFormat.TEXT,
) -> None:
    """Train, and show progress, the result and how to open its dashboard."""
    as_json = log_format is LogFormat.JSON
    with endings(as_json=as_json):
        loaded = load_config(config, overrides, allow_module)
        if quiet or as_json:
            loaded = _without_console(loaded)
        from safeloop.trainer import trainer_class

        result = trainer_class(loaded)(loaded).fit()
        if as_json:
            out(_json(result))
        elif not _has_console(loaded):
            if result.faults:
                err("\n\n".join(map(str, result.faults)))
            out(str(result.dir or ""))


def _has_console(loaded: Loaded) -> bool:
    return any(_is_console(sink) for sink in loaded.config.log.sinks)


def _without_console(loaded: Loaded) -> Loaded:
    log = loaded.config.log
    sinks = tuple(sink for sink in log.sinks if not _is_console(sink))
    config = loaded.config.model_copy(update={"log": log.model_copy(update={"sinks": sinks})})
    return dataclasses.replace(loaded, config=config)


def _is_console(sink: object) -> bool:
    return "console" in (sink, getattr(sink, "type", None))


def _json(result: RunResult) -> str:
    record = {
        "outcome": result.outcome,
        "steps": result.steps,
        "epochs": result.epochs,
        "seconds": round(result.seconds, 3),
        "metrics": _finite(result.metrics),
        "losses": _finite(result.losses),
        "faults": [dataclasses.asdict(fault) for fault in result.faults],
        "dir": str(result.dir) if result.dir else None,
    }
    return json.dumps(record, allow_nan=False)


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
