"""Penalties of runs without a line of Python: of which value and where are paths that the config names."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from safeloop.checks.config.run import BadInputPath
from safeloop.config.inputs import follow
from safeloop.penalties.base import Penalty
from safeloop.penalties.request import Reduction, Request

if TYPE_CHECKING:
    from safeloop.config import Loaded


class DeclaredPenalties:
    """Penalties by name, as functions of a batch, the model's output and the losses.

    Args:
        loaded: the config, which also says where each path stands.
        penalties: sections with `of` and `at`.
        leaf: makes a leaf of a tensor on the steps when a penalty is due.
    """

    def __init__(self, loaded: Loaded, penalties: Mapping[str, Penalty], leaf: Callable[[Tensor], Tensor]) -> None:
        self._loaded = loaded
        self._penalties = penalties
        self._leaf = leaf

    def __iter__(self) -> Any:
        return iter(self._penalties)

    def only(self, names: Sequence[str]) -> DeclaredPenalties:
        """The same, of some of the penalties."""
        return DeclaredPenalties(self._loaded, {n: p for n, p in self._penalties.items() if n in names}, self._leaf)

    def with_leaves(self, batch: Any) -> Any:
        """The batch with a leaf where a penalty is taken; the batch itself where none is due."""
        for path in dict.fromkeys(penalty.at for penalty in self._penalties.values() if penalty.at is not None):
            name = next(name for name, penalty in self._penalties.items() if penalty.at == path)
            where = self._loaded.where(f"penalties.{name}.at")
            there = follow(path, {"batch": batch}, where=where)
            if not isinstance(there, Tensor):
                raise BadInputPath.error(f"{path!r} is a {type(there).__name__}, not a tensor", where=where)
            leaf = self._leaf(there)
            batch = batch if leaf is there else _replaced(batch, path.split(".")[1:], leaf)
        return batch

    def requests(self, batch: Any, output: Any, losses: Mapping[str, Any]) -> dict[str, Request]:
        """A request for each penalty, of what was computed from the batch with its leaves."""
        return {name: self._request(name, penalty, batch, output, losses) for name, penalty in self._penalties.items()}

    def _request(self, name: str, penalty: Penalty, batch: Any, output: Any, losses: Mapping[str, Any]) -> Request:
        assert penalty.of is not None, "a config-only penalty says of what it is"
        assert penalty.at is not None, "a config-only penalty says where it is taken"
        root, _, key = penalty.of.partition(".")
        where = {field: self._loaded.where(f"penalties.{name}.{field}") for field in ("of", "at", "targets")}
        if root == "loss":
            values, reduction = losses[key], self._reduction(key)
        else:
            values, reduction = follow(penalty.of, {"output": output}, where=where["of"]), "none"
        at = follow(penalty.at, {"batch": batch}, where=where["at"])
        wanted = getattr(penalty, "targets", None)
        targets = None if wanted is None else follow(wanted, {"batch": batch}, where=where["targets"])
        return Request(at, None, values, targets, reduction, self._loaded.where(f"penalties.{name}"))

    def _reduction(self, loss: str) -> Reduction:
        """A loss of torch says how it was reduced; the user's own is taken for a mean."""
        return "sum" if getattr(self._loaded.config.losses[loss], "reduction", "mean") == "sum" else "mean"


def _replaced(value: Any, parts: Sequence[str], leaf: Tensor) -> Any:
    """A copy of `value` with the leaf where the parts lead; only what is on the way is copied."""
    if not parts:
        return leaf
    part, rest = parts[0], parts[1:]
    if isinstance(value, Mapping):
        key: Any = part if part in value else int(part)
        changed: Any = copy.copy(value)
        changed[key] = _replaced(value[key], rest, leaf)
        return changed
    if isinstance(value, (list, tuple)) and part.isdecimal():
        items = [_replaced(item, rest, leaf) if index == int(part) else item for index, item in enumerate(value)]
        return value._make(items) if hasattr(value, "_make") else type(value)(items)
    if hasattr(value, "_replace"):
        return value._replace(**{part: _replaced(getattr(value, part), rest, leaf)})
    changed = copy.copy(value)
    setattr(changed, part, _replaced(getattr(value, part), rest, leaf))
    return changed
