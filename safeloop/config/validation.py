"""From pydantic's errors to problems that name the place, the value as it is written and what to write instead."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from safeloop.checks.check import Check
from safeloop.checks.config import run as run_checks
from safeloop.checks.config.keys import MissingKey, UnknownKey, UnknownType
from safeloop.checks.config.values import ValueOutOfRange, WrongType
from safeloop.config.document import parse_value
from safeloop.config.errors import Problem
from safeloop.config.nodes import Node, Path, dotted
from safeloop.config.places import accepted_keys, elsewhere, nearest

Model = TypeVar("Model", bound=BaseModel)

_KINDS: dict[str, str] = {
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "a whole number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("tuple_type", "list_type"), "a list"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type", "mapping_type"), "a section of keys"),
    **dict.fromkeys(("string_type", "string_sub_type"), "text"),
    "path_type": "a path",
    "none_required": "null",
}
_RANGES = {
    "greater_than": ("more than {:g}", "gt"),
    "greater_than_equal": ("{:g} or more", "ge"),
    "less_than": ("less than {:g}", "lt"),
    "less_than_equal": ("{:g} or less", "le"),
    "too_short": ("{} or more values", "min_length"),
    "too_long": ("{} values at most", "max_length"),
    "literal_error": ("{}", "expected"),
    "finite_number": ("a finite number", ""),
    "string_pattern_mismatch": ("like {}", "pattern"),
}
_ALONE = ("extra_forbidden", "missing", "union_tag_invalid", "union_tag_not_found")
_OWN = {
    check.code: check
    for check in vars(run_checks).values()
    if isinstance(check, type) and issubclass(check, Check) and check is not Check
}


def validate(model: type[Model], root: Node, problems: list[Problem]) -> Model | None:
    """The model of the config, or None; every error is added to `problems`."""
    try:
        return model.model_validate(root.plain())
    except ValidationError as error:
        found: dict[Path, list[Mapping[str, Any]]] = {}
        for one in error.errors(include_url=False):
            found.setdefault(_path(one["loc"], root), []).append(one)
        for path, errors in found.items():
            if (
                not any(len(other) > len(path) and other[: len(path)] == path for other in found)
                or errors[0]["type"] in _ALONE
            ):
                problems.append(_problem(model, root, path, errors))
    return None


def _path(loc: tuple[str | int, ...], root: Node) -> Path:
    """The location without the names of union members, which are not written in the config."""
    path: Path = ()
    node: Node | None = root
    tag: Any = None
    for position, part in enumerate(loc):
        is_last = position == len(loc) - 1
        child = node.child(part) if node is not None else None
        if child is None or (part == tag and not is_last):
            path = (*path, part) if is_last and node is not None and _can_hold(node, part) else path
            tag = None
            continue
        path, node = (*path, part), child
        tag = _tag(child, path)
    return path


def _tag(node: Node, path: Path) -> Any:
    """What pydantic puts between a section of a union and its keys: the `type`; a loss term may have none."""
    kind = node.child("type")
    if kind is not None:
        return kind.value
    inside = path[2:] if path[0] == "stages" else path
    if inside and inside[0] == "optimizers" and len(inside) == 2 and isinstance(node.value, dict):
        return "target" if "target" in node.value else None
    is_loss = path[0] == "losses" and len(path) == 2 and isinstance(node.value, dict)
    return None if not is_loss else "target" if "target" in node.value else "declared"


def _can_hold(node: Node, part: str | int) -> bool:
    return (isinstance(node.value, dict) and part != "[key]") if isinstance(part, str) else isinstance(node.value, list)


def _problem(model: type[BaseModel], root: Node, path: Path, errors: list[Mapping[str, Any]]) -> Problem:
    kind = errors[0]["type"]
    node = root.find(path)
    if kind == "extra_forbidden":
        return _unknown_key(model, root, path)
    if kind == "union_tag_not_found" or (kind == "missing" and isinstance(path[-1], str)):
        return _missing_key(model, root, path if kind == "missing" else (*path, "type"))
    if kind == "union_tag_invalid":
        return _unknown_type(root, path, errors[0]["ctx"])
    if errors[0]["loc"][-1] == "[key]":
        at = (node.key or node.at) if node is not None else root.at
        return Problem(ValueOutOfRange.fault(errors[0]["msg"], fix="choose another name"), at, dotted(path))
    at = node.at if node is not None else _parent(root, path).at
    return Problem(_bad_value(path, node, errors), at, dotted(path))


def _bad_value(path: Path, node: Node | None, errors: list[Mapping[str, Any]]) -> Any:
    name, kind = _name(path), errors[0]["type"]
    shown = show(node.value) if node is not None else "missing"
    if kind in _OWN:
        return _OWN[kind].fault(f"{name}: {errors[0]['msg']}")
    expected = list(dict.fromkeys(text for text in map(_expectation, errors) if text))
    wanted = " or ".join(expected) or errors[0]["msg"]
    is_kind = any(error["type"] in _KINDS or error["type"] == "missing" for error in errors)
    check = WrongType if is_kind else ValueOutOfRange
    return check.fault(f"{name} is {shown}, expected {wanted}", fix=_advice(node, wanted, errors))


def _expectation(error: Mapping[str, Any]) -> str:
    kind = error["type"]
    if kind in _KINDS:
        return _KINDS[kind]
    if kind == "missing":
        return f"{error['loc'][-1] + 1} values or more"
    if kind not in _RANGES:
        return str(error["msg"])
    text, key = _RANGES[kind]
    return text.format(error["ctx"][key]) if key else text


def _advice(node: Node | None, wanted: str, errors: list[Mapping[str, Any]]) -> str:
    if node is None:
        return ""
    expected = next((error["ctx"]["expected"] for error in errors if error["type"] == "literal_error"), "")
    words = [word.strip(" '") for word in expected.replace(" or ", ",").split(",") if word]
    near = nearest(node.value, words) if isinstance(node.value, str) and words else None
    if near:
        return f"did you mean {near!r}?"
    if isinstance(node.value, str) and wanted in ("a number", "a whole number", "true or false"):
        inner = parse_value(node.value, "", node.value, [])
        fits = inner is not None and isinstance(inner.value, bool if wanted == "true or false" else (int, float))
        return f"remove the quotes: {node.value}" if fits else ""
    if wanted.startswith("a list") and isinstance(node.value, (str, int, float)):
        return f"write a list: [{show(node.value)}]"
    return ""


def _unknown_key(model: type[BaseModel], root: Node, path: Path) -> Problem:
    node, word = root.find(path), str(path[-1])
    names = accepted_keys(model, root, path[:-1])
    near = nearest(word, names)
    there = None if near else elsewhere(model, word)
    hint = f"did you mean {near!r}? " if near else f"did you mean `{there}`? " if there else ""
    fix = hint + f"accepted here: {', '.join(names)}"
    at = (node.key or node.at) if node is not None else _parent(root, path).at
    return Problem(UnknownKey.fault(f"unknown key {word!r}", fix=fix), at, dotted(path))


def _missing_key(model: type[BaseModel], root: Node, path: Path) -> Problem:
    parent = _parent(root, path)
    names = ", ".join(accepted_keys(model, root, path[:-1]))
    fix = f"add `{path[-1]}` to {dotted(path[:-1]) or 'the file'}" + (f"; accepted there: {names}" if names else "")
    return Problem(MissingKey.fault(f"missing key {str(path[-1])!r}", fix=fix), parent.key or parent.at, dotted(path))


def _unknown_type(root: Node, path: Path, ctx: Mapping[str, Any]) -> Problem:
    block = root.find(path) or root
    node = block.child("type") or block
    names = [name.strip(" '") for name in str(ctx["expected_tags"]).split(",")]
    names = [name for name in names if name not in ("declared", "target")]
    near = nearest(str(node.value), names)
    fix = (f"did you mean {near!r}? " if near else "") + f"known: {', '.join(names)}"
    where = (*path, "type") if node is not block else path
    return Problem(UnknownType.fault(f"unknown type {show(node.value)}", fix=fix), node.at, dotted(where))


def _parent(root: Node, path: Path) -> Node:
    """The innermost section that is written, on the way to a path."""
    return next(found for end in range(len(path) - 1, -1, -1) if (found := root.find(path[:end])) is not None)


def _name(path: Path) -> str:
    words = [str(part) for part in path if isinstance(part, str)]
    return (words[-1] if words else "the config") + "".join(f"[{part}]" for part in path[-1:] if isinstance(part, int))


def show(value: Any) -> str:
    """A value as the YAML would say it, short enough for a sentence."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (dict, list)):
        return "a section" if isinstance(value, dict) else "a list"
    if isinstance(value, float) and not math.isfinite(value):
        return {"inf": ".inf", "-inf": "-.inf"}.get(str(value), ".nan")
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
