"""`safeloop explain CODE`: the page of a check, read from its docstring without importing torch."""

from __future__ import annotations

from typing import Annotated

import typer

from safeloop.checks.explain import UnknownCodeError, page, render
from safeloop.checks.registry import FILES
from safeloop.cli.terminal import out_markdown


def _complete(start: str) -> list[str]:
    return [code for code in FILES if code.startswith(start.upper())]


def explain(
    code: Annotated[
        str, typer.Argument(metavar="CODE", help="Such as SL404.", autocompletion=_complete, show_default=False)
    ],
) -> None:
    """Explain a code: what it catches, why it is bad, a bad and a good example, the fix."""
    try:
        shown = page(code)
    except UnknownCodeError as error:
        hint = "" if error.nearest else f"; codes look like {min(FILES)}"
        raise typer.BadParameter(f"{error}{hint}", param_hint="CODE") from None
    out_markdown(render(shown))
