"""The console: a live display on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import os
import sys
from typing import Literal

from pydantic import Field

from safeloop.component import Bool, Component, Float
from safeloop.sinks.record import RunInfo, Writer


class Console(Component):
    """Shows progress on standard output.

    A terminal gets a live display, drawn by the caller in about a hundredth of the time; `NO_COLOR` is respected.
    A pipe, a file, a notebook or `TERM=dumb` gets plain lines without control characters. Both end with a result block.
    """

    type: Literal["console"] = "console"
    every_s: Float = Field(default=5.0, ge=0)
    """seconds between plain lines"""
    quiet: Bool = False
    """show faults only"""

    def open(self, run: RunInfo) -> Writer:
        """Begin the display. rich is imported here, and only for a terminal."""
        if not self.quiet and sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            from rich.console import Console as Terminal

            from safeloop.sinks.console_live import LiveConsole

            return LiveConsole(run, Terminal(highlight=False))
        from safeloop.sinks.console_plain import PlainConsole

        return PlainConsole(run, sys.stdout, every_s=self.every_s, quiet=self.quiet)
