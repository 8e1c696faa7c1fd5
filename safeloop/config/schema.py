"""The JSON schema of a config file, for editors; shipped with the package, made by `schema_text`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).parents[1] / "schema" / "safeloop.schema.json"


def shipped_schema() -> str:
    """The schema that ships with the package, without importing torch."""
    return SHIPPED.read_text(encoding="utf-8")


def schema_text() -> str:
    """The schema, made from the models and the installed torch, whose version it names under `x-torch`."""
    import torch

    from safeloop.config.run import RunConfig

    schema = RunConfig.model_json_schema()
    for section in schema["$defs"].values():
        properties = section.get("properties", {})
        if "const" in properties.get("type", {}) and "type" not in section.get("required", []):
            section["required"] = ["type", *section.get("required", [])]
    extends = {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        "description": "files that this one is laid on, relative to it",
    }
    schema["properties"] = {"extends": extends, **schema["properties"]}
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "safeloop config",
        "x-torch": torch.__version__.partition("+")[0],
    }
    return json.dumps(head | {key: value for key, value in _lean(schema).items() if key != "title"}, indent=1) + "\n"


def _lean(value: Any) -> Any:
    """Without the titles that pydantic makes of field names, which only repeat them."""
    if isinstance(value, dict):
        is_field = "title" in value and isinstance(value["title"], str)
        return {key: _lean(inner) for key, inner in value.items() if not (is_field and key == "title")}
    return [_lean(item) for item in value] if isinstance(value, list) else value


def write_schema(path: Path = SHIPPED) -> None:
    """Write the schema file anew, after a change of a model or of torch."""
    path.write_text(schema_text(), encoding="utf-8")
