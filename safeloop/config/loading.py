"""`load`: from files, environment, overrides and keywords to a checked `RunConfig`, or to every error at once."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from safeloop.config import nodes
from safeloop.config.document import to_yaml
from safeloop.config.errors import ConfigError, Problem
from safeloop.config.nodes import Origin, dotted
from safeloop.config.sources import Sources
from safeloop.faults import Fault

if TYPE_CHECKING:
    from safeloop.checks.check import Check
    from safeloop.config.run import RunConfig

_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Loaded:
    """A config that holds, and where each of its values is written."""

    config: RunConfig
    origins: dict[nodes.Path, Origin]
    """path -> origin, for everything that is written; what is missing here is a default"""
    warnings: list[Fault]
    text: str
    """the resolved config as YAML, safeloop's defaults included; `load` reads it back as the same config"""
    path: Path | None
    allow: tuple[str, ...]
    """module prefixes that targets may name"""

    stage: nodes.Path = ()
    """where the stage is written whose config this is; empty for that of the whole run"""

    def within(self, stage: nodes.Path, **sections: Any) -> Loaded:
        """The config while a stage lasts: some sections are the stage's own, and are written there."""
        return replace(self, config=self.config.model_copy(update=sections), stage=stage)

    def where(self, path: str | nodes.Path) -> str:
        """Where a value is written, as `configs/x.yaml:10:7`; empty for a default."""
        origin = self._origin(path)
        return str(origin) if origin is not None else ""

    def error(
        self, check: type[Check], path: str | nodes.Path, what: str, *, why: str = "", fix: str = ""
    ) -> ConfigError:
        """A fault that was found later about a written value, with its line and a caret, ready to be raised."""
        name = self.whole(path if isinstance(path, str) else dotted(path))
        return ConfigError([Problem(check.fault(what, why=why, fix=fix, severity="error"), self._origin(path), name)])

    def _origin(self, path: str | nodes.Path) -> Origin | None:
        wanted = self.whole(dotted(path) if isinstance(path, tuple) else path)
        return next((origin for written, origin in self.origins.items() if dotted(written) == wanted), None)

    def whole(self, path: str) -> str:
        """The path from the top of the file."""
        is_own = self.stage and (path == "optimizers" or path.startswith("optimizers."))
        return f"{dotted(self.stage)}.{path}" if is_own else path


def load(
    path: str | Path | None = None,
    *,
    sections: Mapping[str, Any] = _NOTHING,
    overrides: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    allow_modules: Sequence[str] = (),
    given: Collection[str] = (),
) -> Loaded:
    """Load and check a config. Nothing is built or run; modules of allowed targets are imported.

    Precedence: defaults < `extends` < file < environment < overrides < sections.

    Args:
        path: a YAML file.
        sections: keywords of a Trainer: section -> dict or component.
        overrides: `section.key=value`, from the command line.
        environment: variables, of which `SAFELOOP__SECTION__KEY` count; the process's own if None.
        allow_modules: module prefixes that targets may name, besides safeloop's and pyproject.toml's.
        given: what the caller has as objects: "model", "data", "eval_data", "optimizers", "trainer", "losses". It is
            not required, and what the file says of the first four is left out.

    Raises:
        ConfigError: with every problem of SL101 to SL119 that can be seen.
    """
    sources = Sources()
    file = Path(path) if path is not None else None
    root = sources.compose(file, os.environ if environment is None else environment, overrides, sections, given)
    problems = sources.problems
    if not sources.is_readable:
        raise ConfigError(problems)
    from safeloop.config.rules import problems_of, warnings_of
    from safeloop.config.run import RunConfig
    from safeloop.config.validation import validate
    from safeloop.target import allowed_modules

    allow = allowed_modules(allow_modules)
    config = validate(RunConfig, root, problems)
    problems += problems_of(root, allow, given)
    if config is None or problems:
        raise ConfigError(problems)
    origins = {place: node.at for place, node in root.walk() if place}
    return Loaded(config, origins, [one.placed() for one in warnings_of(root)], to_yaml(config.resolved()), file, allow)
