"""`safeloop`: the command and its subcommands."""

from __future__ import annotations

import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from safeloop import __version__
from safeloop.cli.check import check
from safeloop.cli.doctor import doctor
from safeloop.cli.explain import explain
from safeloop.cli.plan import plan
from safeloop.cli.replay import replay
from safeloop.cli.schema import schema
from safeloop.cli.train import train

app = typer.Typer(
    name="safeloop",
    help="A PyTorch training loop in which a gradient bug cannot stay silent.",
    epilog="Exit codes: 0 ok, 1 an exception of your code, 2 usage or config, 3 a fault in plan or training, "
    "4 checkpoint, 5 ranks, 6 data or environment, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (train, check, plan, doctor, explain, replay, schema):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"safeloop {__version__}")
        raise typer.Exit


@app.callback()
def _safeloop(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """A PyTorch training loop in which a gradient bug cannot stay silent."""


def main() -> None:
    """Run the command line; ends the process with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a log in ASCII shows `\xe9` instead of ending a run
    app(prog_name="safeloop")
