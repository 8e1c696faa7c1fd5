"""The base of every part that a config can name: a frozen pydantic model; its fields are the YAML, its methods pure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Strict

Int = Annotated[int, Strict()]
"""An integer as YAML writes it: `2`, not `2.0`, `"2"` or `true`."""

Float = Annotated[float, Strict()]
"""A finite number as YAML writes it: `1e-3` or `1`, not `"1e-3"`, `true` or `.nan`."""

Bool = Annotated[bool, Strict()]
"""`true` or `false`, not `1` or `"yes"`."""


class Component(BaseModel):
    """A frozen set of hyperparameters. Unknown keys, NaN and infinity are refused; state is passed to its methods."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    keeps_foreign_defaults: ClassVar[bool] = False
    """Whether unset fields stay unset in `resolved`, since their defaults belong to another library."""

    def written(self) -> dict[str, Any]:
        """What was given to this component, and its `type`, as plain data: the YAML that makes it again."""
        wanted = self.model_fields_set | {"type"}
        return {name: _plain(value, all_fields=False) for name, value in self if name in wanted}

    def resolved(self) -> dict[str, Any]:
        """What was given and safeloop's own defaults, as plain data; a default of null is left out."""
        fields = type(self).model_fields
        given = self.model_fields_set | {"type"}
        return {
            name: _plain(value, all_fields=True)
            for name, value in self
            if name in given or not (self.keeps_foreign_defaults or (value is None and fields[name].default is None))
        }


def _plain(value: Any, *, all_fields: bool) -> Any:
    if isinstance(value, Component):
        return value.resolved() if all_fields else value.written()
    if isinstance(value, Mapping):
        return {key: _plain(inner, all_fields=all_fields) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, all_fields=all_fields) for inner in value]
    return str(value) if isinstance(value, PurePath) else value
