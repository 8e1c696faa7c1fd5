"""What is accepted at a place of the config, read from the models themselves."""

from __future__ import annotations

import types
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from safeloop.config.nodes import Node, Path

OTHER_WORDS = {
    "clip": "max_norm",
    "clip_norm": "max_norm",
    "grad_clip": "max_norm",
    "gradient_clip_val": "max_norm",
    "max_grad_norm": "max_norm",
    "learning_rate": "lr",
    "steps": "max_steps",
    "epochs": "max_epochs",
    "num_epochs": "max_epochs",
    "parameters": "params",
    "optimizer": "optimizers",
    "optim": "optimizers",
    "loss": "losses",
    "eval": "evaluate",
    "logging": "log",
    "clip_grad": "max_norm",
    "name": "type",
    "class": "target",
    "_target_": "target",
    "kwargs": "args",
}
"""What other frameworks call it."""


def accepted_keys(model: type[BaseModel], root: Node, path: Path) -> list[str]:
    """The keys that the section at `path` may have, sorted; a section with a `type` has those of that type."""
    kinds: list[Any] = [model]
    node: Node | None = root
    for part in path:
        kinds = [inner for kind in _fitting(kinds, node) for inner in _inside(kind, part)]
        node = node.child(part) if node is not None else None
    return sorted({name for kind in _fitting(kinds, node) if _is_model(kind) for name in kind.model_fields})


def nearest(word: str, words: list[str]) -> str | None:
    """The word that was probably meant, or None."""
    if OTHER_WORDS.get(word) in words:
        return OTHER_WORDS[word]
    by_lower = {one.lower(): one for one in reversed(words)}
    near = get_close_matches(word.lower(), list(by_lower), 1, 0.5)
    return by_lower[near[0]] if near else None


def elsewhere(model: type[BaseModel], word: str) -> str | None:
    """`section.key`, if a section of the top level has that key."""
    word = OTHER_WORDS.get(word, word)
    for name, field in model.model_fields.items():
        for kind in _flat(field.annotation):
            inner = _flat(get_args(kind)[1]) if get_origin(kind) is dict else []
            if _is_model(kind) and word in kind.model_fields:
                return f"{name}.{word}"
            if any(_is_model(one) and word in one.model_fields for one in inner):
                return f"{name}.<name>.{word}"
    return None


def _fitting(kinds: list[Any], node: Node | None) -> list[Any]:
    """Of several models, those whose `type` is the written one; or those with a `target`, or neither."""
    kinds = [flat for kind in kinds for flat in _flat(kind)]
    section: Mapping[str, Node] = node.value if node is not None and isinstance(node.value, dict) else {}
    if "type" in section:
        named = [kind for kind in kinds if _is_model(kind) and section["type"].value in _types(kind)]
        return named or kinds
    if "target" in section:
        return [kind for kind in kinds if _is_model(kind) and "target" in kind.model_fields] or kinds
    return kinds


def _types(kind: type[BaseModel]) -> tuple[Any, ...]:
    field = kind.model_fields.get("type")
    return get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()


def _inside(kind: Any, part: str | int) -> list[Any]:
    if _is_model(kind):
        field = kind.model_fields.get(part)
        return [] if field is None else [field.annotation]
    origin, args = get_origin(kind), get_args(kind)
    if origin is dict and len(args) == 2:
        return [args[1]]
    return [args[0]] if origin in (list, tuple) and args else []


def _flat(kind: Any) -> list[Any]:
    origin = get_origin(kind)
    if origin is Annotated:
        return _flat(get_args(kind)[0])
    if origin in (Union, types.UnionType):
        return [flat for arm in get_args(kind) for flat in _flat(arm)]
    return [kind]


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
