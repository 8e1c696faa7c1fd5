"""YAML with positions: YAML 1.2 numbers and booleans, no tags, no duplicate keys, a limit on size and depth."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml
from yaml.nodes import MappingNode, ScalarNode, SequenceNode

from safeloop.checks.config.document import DuplicateKey, UnreadableYaml
from safeloop.config.errors import Problem
from safeloop.config.nodes import MAX_DEPTH, Node, Origin

MAX_NODES = 10_000
MAX_BYTES = 1_000_000
_TAG = "tag:yaml.org,2002:"
_LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
_RESOLVERS = (
    (_TAG + "null", r"(?:null|Null|NULL|~|)\Z", ["n", "N", "~", ""]),
    (_TAG + "bool", r"(?:true|True|TRUE|false|False|FALSE)\Z", list("tTfF")),
    (_TAG + "int", r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z", list("-+0123456789")),
    (
        _TAG + "float",
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z",
        list("-+0123456789."),
    ),
)
_Place = Callable[[Any, Any], Origin]


class _UnreadableError(Exception):
    """The document cannot be read at all; holds what and the mark of where."""

    def __init__(self, what: str, mark: Any = None, fix: str = "") -> None:
        super().__init__(what)
        self.what, self.mark, self.fix = what, mark, fix


class _Loader(yaml.SafeLoader):
    """Composes nodes only: nothing is constructed from a tag. PyYAML itself would read `1e-3` as text, `on` as true."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    depth = 0
    num_nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        self.num_nodes += 1
        _refuse_too_much(self.depth, self.num_nodes, self.get_mark())
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


class _Dumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or 1.2 would read as something other than text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> ScalarNode:
    """PyYAML folds line breaks other than a newline into spaces, unless the text is in double quotes."""
    style = '"' if _LINE_BREAK.search(text.replace("\n", "")) else None
    return dumper.represent_scalar(_TAG + "str", text, style=style)


_Dumper.add_representer(str, _represent_text)
for _tag, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), _first)
    _Dumper.add_implicit_resolver(_tag, re.compile(_pattern), _first)
for _char, _old in yaml.SafeDumper.yaml_implicit_resolvers.items():
    _Dumper.yaml_implicit_resolvers.setdefault(_char, []).extend(_old)


def parse(text: str, source: str, problems: list[Problem]) -> Node | None:
    """The document as nodes, or None where it cannot be read; what is wrong is added to `problems`.

    An empty document is an empty section.
    """
    lines = _LINE_BREAK.split(text)

    def place(start: Any, end: Any) -> Origin:
        line = lines[start.line] if start.line < len(lines) else ""
        stop = end.column if end.line == start.line else len(line)
        return Origin(source, start.line + 1, start.column + 1, max(1, stop - start.column), line)

    return _parse(text, place, Origin(source, 1, 1, 1, lines[0]), problems)


def parse_value(text: str, source: str, shown: str, problems: list[Problem]) -> Node | None:
    """A single value (of an override or an environment variable) that stands at the end of the line `shown`."""
    offset = len(shown) - len(text)

    def place(start: Any, end: Any) -> Origin:
        if start.line:
            return Origin(source, column=offset + 1, width=max(1, len(text)), text=shown)
        width = (end.column if end.line == 0 else len(text)) - start.column
        return Origin(source, column=offset + start.column + 1, width=max(1, width), text=shown)

    node = _parse(text, place, Origin(source, column=offset + 1, text=shown), problems)
    return Node(None, node.at) if node is not None and node.value == {} and not text.strip() else node


def to_yaml(data: Any, *, one_line: bool = False) -> str:
    """Plain data as YAML that `parse` reads back as the same data."""
    flow, width = (True, 1_000_000) if one_line else (None, 110)
    text: str = yaml.dump(
        data, Dumper=_Dumper, sort_keys=False, default_flow_style=flow, width=width, allow_unicode=True
    )
    return text


def _parse(text: str, place: _Place, start: Origin, problems: list[Problem]) -> Node | None:
    reader: _Loader | None = None
    try:
        reader = _Loader(text)
        root = reader.get_single_node()
        return Node({}, start) if root is None else _Walk(place, problems).node(root, None, 1)
    except _UnreadableError as error:
        mark, what, fix = error.mark, error.what, error.fix
    except yaml.MarkedYAMLError as error:
        mark, what, fix = error.problem_mark or error.context_mark, _yaml_text(error), ""
    except yaml.reader.ReaderError as error:
        start = _at_character(text, error.position, start)
        mark, what, fix = None, f"character U+{ord(text[error.position]):04X} is not allowed in YAML", "remove it"
    except (ValueError, OverflowError, IndexError) as error:  # PyYAML's scanner, at escapes and directives out of range
        mark, what, fix = reader.get_mark() if reader else None, f"not YAML: {error}", ""
    at = place(mark, mark) if mark is not None else start
    problems.append(Problem(UnreadableYaml.fault(what, fix=fix), at))
    return None


class _Walk:
    """From PyYAML's nodes to ours; counts what aliases expand to."""

    def __init__(self, place: _Place, problems: list[Problem]) -> None:
        self.place, self.problems, self.num_nodes = place, problems, 0

    def node(self, raw: Any, key: Origin | None, depth: int) -> Node:
        self.num_nodes += 1
        _refuse_too_much(depth, self.num_nodes, raw.start_mark)
        at = self.place(raw.start_mark, raw.end_mark)
        if isinstance(raw, MappingNode) and raw.tag == _TAG + "map":
            return Node(self.section(raw, depth), at, key)
        if isinstance(raw, SequenceNode) and raw.tag == _TAG + "seq":
            return Node([self.node(item, None, depth + 1) for item in raw.value], at, key)
        try:
            return Node(_scalar(raw), at, key)
        except ValueError as error:
            self.problems.append(Problem(UnreadableYaml.fault(str(error), fix="write plain values, without a tag"), at))
            return Node(None, at, key)

    def section(self, raw: MappingNode, depth: int) -> dict[str, Node]:
        found: dict[str, Node] = {}
        for raw_key, raw_value in raw.value:
            at = self.place(raw_key.start_mark, raw_key.end_mark)
            if raw_key.tag != _TAG + "str" or not isinstance(raw_key, ScalarNode):
                shown = repr(raw_key.value) if isinstance(raw_key, ScalarNode) else "a list or section"
                self.problems.append(
                    Problem(UnreadableYaml.fault(f"key {shown} is not text", fix="put it in quotes"), at)
                )
                continue
            name = raw_key.value
            if name == "<<":
                fix = "write the keys out, or use `extends`"
                self.problems.append(Problem(UnreadableYaml.fault("merge keys (`<<`) are not YAML 1.2", fix=fix), at))
                continue
            if name in found:
                first = found[name].key
                what = f"duplicate key {name!r}" + (f", first at line {first.line}" if first and first.line else "")
                self.problems.append(Problem(DuplicateKey.fault(what, fix="remove one of the two"), at))
            found[name] = self.node(raw_value, at, depth + 1)
        return found


def _scalar(raw: Any) -> Any:
    text, tag = raw.value, raw.tag.removeprefix(_TAG)
    if not isinstance(raw, ScalarNode) or tag not in ("str", "null", "bool", "int", "float", "!"):
        raise ValueError(f"tag {raw.tag!r} is not allowed")
    if tag == "null":
        return None
    if tag == "bool" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if tag == "int":
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text[2:] if base != 10 else text, base)
    if tag == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if tag == "bool":
        raise ValueError(f"{text!r} is not true or false")
    return text


def _refuse_too_much(depth: int, num_nodes: int, mark: Any) -> None:
    if depth > MAX_DEPTH:
        raise _UnreadableError(
            f"nested deeper than {MAX_DEPTH} levels", mark, "flatten it; an alias must not contain itself"
        )
    if num_nodes > MAX_NODES:
        raise _UnreadableError(f"more than {MAX_NODES:,} values", mark, "a config is small; load large data in code")


def _yaml_text(error: yaml.MarkedYAMLError) -> str:
    return "not YAML: " + ", ".join(part for part in (error.problem, error.context) if part)


def _at_character(text: str, position: int, start: Origin) -> Origin:
    breaks = list(_LINE_BREAK.finditer(text, 0, position))
    begin = breaks[-1].end() if breaks else 0
    if not start.line:
        return Origin(start.source, column=start.column + position, text=start.text)
    line = _LINE_BREAK.split(text[begin:], maxsplit=1)[0]
    return Origin(start.source, len(breaks) + 1, position - begin + 1, 1, line)
