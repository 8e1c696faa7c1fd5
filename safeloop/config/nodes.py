"""Values that know where they are written: plain trees of nodes, with a position for every value and every key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, TypeAlias

from safeloop.component import Component

Path: TypeAlias = tuple[str | int, ...]
"""Keys and list indices from the top: `("optimizers", "main", "lr")`."""

MAX_DEPTH = 64


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value is written: a file with line and column (from 1), a variable, the command line, a keyword."""

    source: str
    line: int = 0
    """0 where the source has no lines"""
    column: int = 0
    width: int = 1
    text: str = ""
    """the line as it is written, for the caret"""

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


@dataclass(frozen=True, slots=True)
class Node:
    """A value, where it is written, and where its key is. A section's value is a dict of nodes, a list's a list."""

    value: Any
    at: Origin
    key: Origin | None = None

    def child(self, part: str | int) -> Node | None:
        """What stands under a key or index, or None."""
        if isinstance(self.value, dict):
            return self.value.get(part)
        if isinstance(self.value, list) and isinstance(part, int) and 0 <= part < len(self.value):
            found: Node = self.value[part]
            return found
        return None

    def find(self, path: Path) -> Node | None:
        """What stands at a path, or None."""
        node: Node | None = self
        for part in path:
            node = node.child(part) if node is not None else None
        return node

    def plain(self) -> Any:
        """The value without positions."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def walk(self, path: Path = ()) -> Iterator[tuple[Path, Node]]:
        """Every node with its path, this one first."""
        yield path, self
        inner = (
            self.value.items()
            if isinstance(self.value, dict)
            else enumerate(self.value)
            if isinstance(self.value, list)
            else ()
        )
        for part, node in inner:
            yield from node.walk((*path, part))


def is_set(section: Node, key: str) -> bool:
    """Whether a section has a key whose value is not null."""
    node = section.child(key)
    return node is not None and node.value is not None


def number(node: Node | None) -> float | None:
    """The number that is written there, or None."""
    is_number = node is not None and isinstance(node.value, (int, float)) and not isinstance(node.value, bool)
    return node.value if is_number and node is not None else None


def dotted(path: Path) -> str:
    """The path as a person writes it: `optimizers.main.lr`."""
    return ".".join(str(part) for part in path)


def from_python(value: Any, source: str, path: Path) -> Node:
    """The node of a Python value that was given as a keyword; its positions show `path = value`.

    Raises:
        ValueError: nested deeper than 64 levels.
    """
    if len(path) > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, Component):
        value = value.written()
    is_section, is_list = isinstance(value, Mapping), isinstance(value, (list, tuple))
    shown = "{...}" if is_section else "[...]" if is_list else repr(value)[:60]
    name = dotted(path)
    text = f"{name} = {shown}"
    at, key = (
        Origin(source, column=len(name) + 4, width=len(shown), text=text),
        Origin(source, column=1, width=len(name), text=text),
    )
    if is_section:
        return Node({str(k): from_python(v, source, (*path, str(k))) for k, v in value.items()}, at, key)
    if is_list:
        return Node([from_python(v, source, (*path, i)) for i, v in enumerate(value)], at, key)
    return Node(str(value) if isinstance(value, PurePath) else value, at, key)
