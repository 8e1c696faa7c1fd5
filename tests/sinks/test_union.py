"""The sinks as config."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from safeloop.sinks.union import DEFAULTS, SinkName, SinkSpec

ADAPTER: TypeAdapter[Any] = TypeAdapter(SinkSpec)


@pytest.mark.parametrize("name", get_args(SinkName))
def test_a_name_stands_for_the_sink_of_that_type_with_its_defaults(name: SinkName) -> None:
    assert DEFAULTS[name] == ADAPTER.validate_python({"type": name})
    assert DEFAULTS[name].type == name


def test_every_sink_of_the_union_has_a_default() -> None:
    assert set(DEFAULTS) == set(get_args(SinkName)) == set(ADAPTER.json_schema()["discriminator"]["mapping"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"type": "wandb"},
        {"type": "console", "evry_s": 1.0},
        {"type": "console", "every_s": -1.0},
        {"type": "console", "every_s": "5"},
        {"type": "console", "quiet": 1},
        {"type": "tensorboard", "flush_every": 0},
        {"type": "tensorboard", "flush_every": 2.5},
        {"type": "tensorboard", "flush_s": float("nan")},
        {"type": "jsonl", "path": "/etc/passwd"},
    ],
    ids=str,
)
def test_a_wrong_value_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ADAPTER.validate_python(wrong)
