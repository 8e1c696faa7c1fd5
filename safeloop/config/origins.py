"""Where each value of a loaded config comes from, as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from safeloop.config.document import to_yaml
from safeloop.config.nodes import Path, dotted
from safeloop.faults import printable

if TYPE_CHECKING:
    from safeloop.config.loading import Loaded


def origin_text(loaded: Loaded) -> str:
    """Every value of the config, one a line, with its file:line:column, variable or keyword, or `default`."""
    rows = [
        (f"{dotted(path)} = {value}", str(loaded.origins.get(path, "default")))
        for path, value in _leaves(loaded.config.resolved(), ())
    ]
    width = min(max((len(left) for left, _ in rows), default=0), 70)
    return "\n".join(printable(f"{left:<{width}}  {right}") for left, right in rows)


def _leaves(value: Any, path: Path) -> Iterator[tuple[Path, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    else:
        yield path, _flow(value)


def _flow(value: Any) -> str:
    return to_yaml([value], one_line=True).strip()[1:-1]
