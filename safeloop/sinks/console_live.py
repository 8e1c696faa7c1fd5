"""The live display on a terminal. Imports rich, so import it only when a run opens."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from safeloop.faults import Fault
from safeloop.sinks.console_status import Status, losses, optimizers, speed
from safeloop.sinks.record import FINISHED, Record, RunInfo

_SHORTEST_S = 0.1
_SHARE = 0.01
_BAR_WIDTH = 32


class LiveConsole:
    """Redraws a few lines in place; what the user prints meanwhile appears above them.

    There is no thread: the caller draws, not before a hundred times the cost of the last drawing has passed.
    """

    def __init__(self, run: RunInfo, console: Console) -> None:
        is_utf = console.encoding.lower().startswith("utf")
        self._status = Status(run, arrow="→", times="×") if is_utf else Status(run)
        self._console = console
        self._live = Live(_display(self._status), console=console, auto_refresh=False, transient=True)
        self._due = 0.0
        self._live.start(refresh=True)

    def progress(self, step: int, scalars: Mapping[str, float]) -> None:
        """Move the bar. Costs under a microsecond unless a drawing is due."""
        self._status.reach(step, scalars)
        if time.monotonic() >= self._due:
            self._print_faults(with_errors=True)
            self._draw()

    def write(self, record: Record) -> None:
        """Remember the record, for the next drawing."""
        self._status.take(record)
        self.progress(record.step, {})

    def fault(self, fault: Fault, step: int, count: int) -> None:
        """Print a warning above the display now, an error once the run goes on."""
        self._status.take_fault(fault, step, count)
        self._print_faults(with_errors=False)

    def flush(self) -> None:
        """Draw now."""
        self._draw()

    def close(self, outcome: str) -> None:
        """Take the display away and print the result block."""
        self._live.stop()
        self._print_faults(with_errors=outcome == FINISHED)
        rows = self._status.result(outcome)
        if rows:
            self._console.print(_result(rows, is_good=outcome == FINISHED), soft_wrap=True)

    def _print_faults(self, *, with_errors: bool) -> None:
        for fault, text in self._status.news(with_errors=with_errors):
            shown = Text(text)
            shown.stylize(
                "bold yellow" if fault.severity == "warning" else "bold red", 0, text.find("\n") % (len(text) + 1)
            )
            self._console.print(shown, soft_wrap=True)

    def _draw(self) -> None:
        begin = time.monotonic()
        self._live.update(_display(self._status), refresh=True)
        end = time.monotonic()
        self._due = end + max(_SHORTEST_S, (end - begin) / _SHARE)


def _display(status: Status) -> RenderableType:
    """The bar, where the run is, its losses and metrics, a line for each optimizer, and the faults so far."""
    longest, fraction = status.run.max_steps, status.fraction
    head: list[RenderableType] = [Text(status.name, "bold")]
    if fraction is not None:
        bar = ProgressBar(
            total=1.0, completed=fraction, width=_BAR_WIDTH, complete_style="cyan", finished_style="green"
        )
        head += [bar, Text(f"{fraction:.0%}"), Text(status.left(), "cyan")]
    grid = Table.grid(padding=(0, 2))
    grid.add_row(*head)
    place = f"{status.step:,}/{longest:,}" if longest else f"{status.step:,}"
    lines = [_line([_pair("step", place), _pair("epoch", str(status.epoch)), Text(speed(status.latest))])]
    lines.append(_line([_pair(label, text) for label, text in losses(status.latest)]))
    owners = [row for row in optimizers(status.latest, status.run.owners, status.arrow) if any(row[1:])]
    name_width, norm_width = (max((len(owner[i]) for owner in owners), default=0) for i in (0, 1))
    for name, norm, lr in owners:
        norm_pair = _pair("gradient norm", norm) + Text(" " * (norm_width - len(norm)))
        lines.append(_line([Text(f"{name:<{name_width}}", "dim"), norm_pair, _pair("lr", lr)]))
    if tally := status.tally():
        lines.append(_line([Text.assemble(("faults ", "dim"), (tally, "bold yellow"))]))
    return Group(grid, *(line for line in lines if line.plain.strip()))


def _line(parts: Sequence[Text]) -> Text:
    line = Text("  ", no_wrap=True, overflow="ellipsis")
    return line.append_text(Text("   ").join(part for part in parts if part.plain.strip()))


def _result(rows: Sequence[tuple[str, str]], *, is_good: bool) -> Text:
    (heading, took), *rest = rows
    width = max(len(label) for label, _ in rest)
    block = Text.assemble((heading, "bold green" if is_good else "bold red"), f"  {took}")
    for label, text in rest:
        block.append(f"\n  {label:<{width}}  ", "dim").append(text, _style(text))
    return block


def _pair(label: str, text: str) -> Text:
    return Text.assemble((f"{label} ", "dim"), (text, _style(text))) if text else Text()


def _style(text: str) -> str:
    return "bold red" if text.split(" ")[-1] in ("nan", "inf", "-inf") else "bold"
