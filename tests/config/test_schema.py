from __future__ import annotations

import json

import pytest
import torch
import yaml

from safeloop.config.schema import schema_text, shipped_schema

SCHEMA = json.loads(shipped_schema())


def fits(value, schema):
    """A small validator of what our schema uses; an independent second reading of a config."""
    if "$ref" in schema:
        return fits(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")])
    if "oneOf" in schema and sum(fits(value, one) for one in schema["oneOf"]) != 1:
        return False
    if "anyOf" in schema and not any(fits(value, one) for one in schema["anyOf"]):
        return False
    if "const" in schema and value != schema["const"]:
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "type" in schema and not has_type(value, schema["type"]):
        return False
    if isinstance(value, dict):
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", {})
        rules = [(item, properties.get(key, others)) for key, item in value.items()]
        is_complete = all(key in value for key in schema.get("required", []))
        return is_complete and all(
            rule is not False and fits(item, {} if rule is True else rule) for item, rule in rules
        )
    if isinstance(value, list):
        first = schema.get("prefixItems", [])
        items = [fits(item, first[i] if i < len(first) else schema.get("items", {})) for i, item in enumerate(value)]
        return all(items) and schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high = schema.get("minimum", value), schema.get("maximum", value)
        return low <= value <= high and value > schema.get("exclusiveMinimum", value - 1)
    return True


def has_type(value, name):
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "null": type(None),
    }
    return isinstance(value, kinds[name]) and (name == "boolean" or not isinstance(value, bool))


def test_the_shipped_schema_is_what_the_models_say():
    if SCHEMA["x-torch"] != torch.__version__.partition("+")[0]:
        pytest.skip(f"the shipped schema was made with torch {SCHEMA['x-torch']}")
    assert shipped_schema() == schema_text()


def test_a_valid_config_fits_the_schema(valid):
    config = yaml.safe_load(valid.replace("1e-3", "1.0e-3"))
    assert fits(config, SCHEMA)
    assert fits({**config, "optimizers": {"type": "SGD", "lr": 0.1}, "extends": ["a.yaml"]}, SCHEMA)
    assert fits({**config, "log": {"sinks": ["console", {"type": "jsonl"}]}, "losses": {"a": {"weight": 1}}}, SCHEMA)


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("run", {"max_stepps": 3}),
        ("run", {"max_steps": -1}),
        ("run", {"max_steps": 2.5}),
        ("run", {"precision": "banana"}),
        ("optimizers", {"type": "AdamW", "lrr": 1}),
        ("optimizers", {"type": "AdamV"}),
        ("optimizers", {"lr": 0.1}),
        ("optimizers", {"main": {"type": "AdamW", "lr": True}}),
        ("optimizers", {"main": {"type": "AdamW", "max_norm": 0}}),
        ("optimizers", {"main": {"type": "AdamW", "betas": [0.9]}}),
        ("losses", {"a": {"type": "MSELos"}}),
        ("log", {"sinks": ["tensorbord"]}),
        ("extends", 3),
        ("clip", 1),
    ],
)
def test_a_mistake_does_not_fit_the_schema(valid, section, value):
    config = yaml.safe_load(valid.replace("1e-3", "1.0e-3"))
    assert not fits({**config, section: value}, SCHEMA)


def test_our_keys_are_told_apart_from_those_of_torch():
    fields = SCHEMA["$defs"]["AdamWSpec"]["properties"]
    ours = {name for name, field in fields.items() if field.get("x-from") == "safeloop"}
    assert ours == {"params", "groups", "max_norm", "clip_value", "agc", "scheduler"}
    assert {"lr", "betas", "weight_decay"} <= {name for name, field in fields.items() if field.get("x-from") == "torch"}


def test_every_field_of_ours_has_a_meaning():
    for name, section in SCHEMA["$defs"].items():
        for key, field in section.get("properties", {}).items():
            if field.get("x-from") != "torch" and key != "type":
                assert field.get("description"), f"{name}.{key}"
