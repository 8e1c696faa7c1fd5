"""The arguments that several commands share, and loading the config that they name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from safeloop.config import Loaded

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML config file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="a.b=c", help="Values that win over the file and the environment.", show_default=False),
]
AllowModule = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-module", metavar="MODULE", help="A module that targets may name; may be repeated.", show_default=False
    ),
]


def load_config(path: Path, overrides: list[str] | None, allow_modules: list[str] | None) -> Loaded:
    """The validated config. Imports torch; makes the current directory importable, after everything that is installed.

    Raises:
        ConfigError: SL1xx, every mistake at once.
    """
    from safeloop.config import load

    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    return load(path, overrides=overrides or (), allow_modules=allow_modules or ())
