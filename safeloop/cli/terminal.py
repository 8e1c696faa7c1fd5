"""Text to the terminal: results on stdout, faults and errors on stderr, in colour where that is wanted."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rich.console import Console
from rich.markdown import Markdown
from rich.text import Text

from safeloop.faults import Fault

_WIDTH = 100
_HEADS = (
    (re.compile(r"^(?:warning\b.*|SL\d+ .*\(warning\))$", re.MULTILINE), "bold yellow"),
    (re.compile(r"^(?:error\b.*|SL\d+ .*(?<!\(warning\)))$", re.MULTILINE), "bold red"),
    (re.compile(r"^  (?:what|where|why|fix|more) (?= )", re.MULTILINE), "dim"),
    (re.compile(r"^[ \d]*\|(?= |$)", re.MULTILINE), "dim"),
    (re.compile(r"^ *\|[ ]+(\^+)", re.MULTILINE), "bold red"),
)


def out(text: str | Text) -> None:
    """One result to stdout, never wrapped or reflowed."""
    Console(highlight=False, soft_wrap=True, markup=False, emoji=False).print(text)


def out_markdown(text: str) -> None:
    """Markdown to stdout: laid out on a terminal, as it is elsewhere."""
    console = Console()
    if console.is_terminal:
        console.width = min(console.width, _WIDTH)
        console.print(Markdown(text, code_theme="ansi_dark"))
    else:
        out(text.rstrip("\n"))


def err(text: str) -> None:
    """Faults or an error to stderr, their heads coloured."""
    styled = Text(text)
    for pattern, style in _HEADS:
        for match in pattern.finditer(text):
            styled.stylize(style, *match.span(match.lastindex or 0))
    Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False).print(styled)


def summary(faults: Iterable[Fault]) -> str:
    """`SL115 suspicious value x2, SL854 data ended early`, or `none`."""
    counts: dict[str, int] = {}
    for fault in faults:
        counts[f"{fault.code} {fault.title}"] = counts.get(f"{fault.code} {fault.title}", 0) + 1
    return ", ".join(name + (f" x{count}" if count > 1 else "") for name, count in counts.items()) or "none"
