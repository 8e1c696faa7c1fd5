"""Input paths of config-only runs: `batch.1`, `output.logits`."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, NoReturn

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from safeloop.checks.config.run import BadInputPath


def _checked(path: str) -> str:
    root, *parts = path.split(".")
    if root not in ("batch", "output") or not all(part and (part.isdecimal() or part.isidentifier()) for part in parts):
        raise PydanticCustomError(
            BadInputPath.code, "{path} leads nowhere; start with `batch` or `output`", {"path": repr(path)}
        )
    return path


def _checked_batch(path: str) -> str:
    if _checked(path).partition(".")[0] != "batch":
        raise PydanticCustomError(
            BadInputPath.code, "{path}: a model's inputs start with `batch`", {"path": repr(path)}
        )
    return path


InputPath = Annotated[str, AfterValidator(_checked)]
"""`batch` or `output`, then keys, indices or attributes: `batch.1`, `output.logits`."""

BatchPath = Annotated[str, AfterValidator(_checked_batch)]
"""`batch`, then keys, indices or attributes."""


def follow(path: str, roots: Mapping[str, Any], *, where: str = "") -> Any:
    """What a path leads to.

    Args:
        path: as `InputPath`.
        roots: `{"batch": ..., "output": ...}`.
        where: the place of the path in the config, for the fault.

    Raises:
        FaultError: SL119, if a part of the path does not exist; names what exists there.
    """
    root, *parts = path.split(".")
    value, passed = roots[root], root
    for part in parts:
        value = _step(value, part, path, passed, where)
        passed = f"{passed}.{part}"
    return value


def _step(value: Any, part: str, path: str, passed: str, where: str) -> Any:
    if isinstance(value, Mapping):
        key: Any = part if part in value else int(part) if part.isdecimal() and int(part) in value else None
        return value[key] if key is not None else _nowhere(path, part, passed, where, [str(k) for k in value])
    if isinstance(value, (list, tuple)) and part.isdecimal():
        index = int(part)
        return (
            value[index]
            if index < len(value)
            else _nowhere(path, part, passed, where, [str(i) for i in range(len(value))])
        )
    if not part.startswith("_") and not part.isdecimal() and hasattr(value, part):
        return getattr(value, part)
    return _nowhere(path, part, passed, where, [], kind=type(value).__name__)


def _nowhere(path: str, part: str, passed: str, where: str, names: list[str], kind: str = "") -> NoReturn:
    near = get_close_matches(part, names, 1, 0.5)
    what = f"{path!r}: {passed} has no {part!r}" + (f", it is a {kind}" if kind else "")
    fix = f"did you mean {passed}.{near[0]}? " if near else ""
    fix += f"{passed} has {', '.join(names[:20])}" if names else ""
    raise BadInputPath.error(what, where=where, fix=fix or "correct the path")
