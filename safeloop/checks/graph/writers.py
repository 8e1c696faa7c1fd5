"""How a fault tells where a saved tensor was saved and who may have written it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from safeloop.autograd.saved_changes import SavedTensorChange
from safeloop.autograd.writes import Write
from safeloop.checks.graph.inplace import lines_that_write, modules_that_write
from safeloop.checks.source import Place

_SHOWN = 6
_UNSEEN = (".data", "numpy", "dlpack", "detach", "set_")


def saved_at(change: SavedTensorChange | None) -> str:
    """`saved at FILE:LINE`, or nothing where that is not known."""
    return f"saved at {Place(*change.saved_at)}" if change is not None and change.saved_at is not None else ""


def saved_for(change: SavedTensorChange) -> str:
    """The operation that had saved it, and what it is to it."""
    argument = f" (its `{change.argument}`)" if change.argument else ""
    return f"`{change.node}`{argument}" if change.node else "the backward pass"


def written_by(writes: Sequence[Write]) -> str:
    """`written by ...`: the operations with their lines; nothing where none was noted."""
    told = [w.description + (f" at {Place(*w.place)}" if w.place is not None else "") for w in writes[:_SHOWN]]
    return f"written by {'; '.join(told)}" if told else ""


def suspects(model: nn.Module, terms_source: str, *, unseen: bool = False) -> str:
    """The lines and modules that write in place; of the lines those first that a version counter does not see."""
    lines = lines_that_write(model, terms_source)
    if unseen:
        lines = sorted(lines, key=lambda place: not any(part in place.text for part in _UNSEEN))
    listed = "; ".join(map(str, lines[:_SHOWN]))
    modules = ", ".join(modules_that_write(model)[:_SHOWN])
    parts = (f"lines that write in place: {listed}" * bool(listed), f"modules with inplace=True: {modules}")
    return "; ".join(part for part, is_there in zip(parts, (listed, modules), strict=True) if is_there)


def joined(*parts: str) -> str:
    """Those that are not empty, one after the other."""
    return "; ".join(filter(None, parts))
