"""The config: YAML with positions, layers, the tree of components, targets, schema. Its names load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safeloop.config.errors import ConfigError as ConfigError
    from safeloop.config.loading import Loaded as Loaded
    from safeloop.config.loading import load as load
    from safeloop.config.nodes import Origin as Origin
    from safeloop.config.origins import origin_text as origin_text
    from safeloop.config.run import RunConfig as RunConfig

__all__ = ["ConfigError", "Loaded", "Origin", "RunConfig", "load", "origin_text"]

_HOMES = {
    "ConfigError": "errors",
    "Loaded": "loading",
    "load": "loading",
    "Origin": "nodes",
    "origin_text": "origins",
    "RunConfig": "run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
