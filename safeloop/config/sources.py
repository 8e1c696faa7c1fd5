"""Where a config comes from: files with `extends`, environment variables, overrides, keywords, in rising precedence."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from safeloop.checks.config.document import BadOverride, MissingFile, UnreadableYaml
from safeloop.checks.config.values import WrongType
from safeloop.config.document import MAX_BYTES, parse, parse_value
from safeloop.config.errors import Problem
from safeloop.config.layers import merge, name_the_optimizers, nested, spelled, without
from safeloop.config.nodes import MAX_DEPTH, Node, Origin, from_python

PREFIX = "SAFELOOP__"
MAX_FILES = 64
LIVE: dict[str, tuple[str, ...]] = {
    "model": ("model",),
    "data": ("data", "train"),
    "eval_data": ("data", "eval"),
    "optimizers": ("optimizers",),
}
"""What a Trainer may be given as an object -> the section of the file that it replaces."""


@dataclass
class Sources:
    """Reads every source and lays them on one another; what is wrong is gathered in `problems`."""

    problems: list[Problem] = field(default_factory=list)
    num_files: int = 0
    is_readable: bool = True
    """False once a file could not be read: what it should bring is then not missed too"""

    def compose(
        self,
        path: Path | None,
        environment: Mapping[str, str],
        overrides: Sequence[str],
        sections: Mapping[str, object],
        given: Collection[str],
    ) -> Node:
        """The whole config as one node."""
        root = Node({}, Origin(str(path) if path else "keywords"))
        if path is not None:
            root = merge(root, self.file(path, None, ()) or Node({}, root.at))
        for layer in (self.environment(environment, root), self.overrides(overrides), self.keywords(sections)):
            root = merge(root, name_the_optimizers(layer, root))
        for name in given:
            root = without(root, LIVE[name]) if name in LIVE else root
        return root

    def file(self, path: Path, named_at: Origin | None, open_files: tuple[Path, ...]) -> Node | None:
        """A file over the files that it extends, or None where it cannot be read."""
        before = len(self.problems)
        node = self._file(path, named_at, open_files)
        self.is_readable = (
            self.is_readable
            and node is not None
            and not any(problem.fault.code == MissingFile.code for problem in self.problems[before:])
        )
        return node

    def _file(self, path: Path, named_at: Origin | None, open_files: tuple[Path, ...]) -> Node | None:
        text = self._text(path, named_at, open_files)
        node = parse(text, _shown(path), self.problems) if text is not None else None
        if node is None:
            return None
        if not isinstance(node.value, dict):
            what = f"the file holds a {'list' if isinstance(node.value, list) else 'single value'}, not sections"
            self.problems.append(
                Problem(WrongType.fault(what, fix="write `run:`, `model:` and so on at the left margin"), node.at)
            )
            return None
        extends = node.value.get("extends")
        layer = name_the_optimizers(without(node, ("extends",)))
        bases = [] if extends is None else self._bases(extends, path, (*open_files, path.resolve()))
        whole = Node({}, node.at)
        for base in (*bases, layer):
            whole = merge(whole, name_the_optimizers(base, whole))
        return whole

    def _bases(self, extends: Node, path: Path, open_files: tuple[Path, ...]) -> list[Node]:
        named = extends.value if isinstance(extends.value, list) else [extends]
        found: list[Node] = []
        for one in named:
            if not isinstance(one.value, str):
                fix = "write `extends: base.yaml` or `extends: [a.yaml, b.yaml]`"
                self.problems.append(Problem(WrongType.fault("`extends` names files", fix=fix), one.at, "extends"))
                continue
            base = self.file(path.parent / one.value, one.at, open_files)
            found += [base] if base is not None else []
        return found

    def _text(self, path: Path, named_at: Origin | None, open_files: tuple[Path, ...]) -> str | None:
        shown = _shown(path)
        self.num_files += 1
        at, where = named_at or Origin(shown), "extends" if named_at else ""
        try:
            if path.resolve() in open_files:
                circle = " -> ".join(_shown(one) for one in (*open_files, path))
                raise _RefusedError(
                    UnreadableYaml.fault(f"`extends` runs in a circle: {circle}", fix="remove one of them")
                )
            if self.num_files > MAX_FILES:
                raise _RefusedError(
                    UnreadableYaml.fault(f"more than {MAX_FILES} files by `extends`", fix="extend fewer files")
                )
            if not path.is_file():
                what = f"{shown} is not a file" if path.exists() else f"no file {shown}"
                raise _RefusedError(MissingFile.fault(what, fix=_nearest_file(path)))
            with path.open("rb") as file:
                raw = file.read(MAX_BYTES + 1)
            if len(raw) > MAX_BYTES:
                raise _RefusedError(
                    UnreadableYaml.fault(f"{shown} is larger than {MAX_BYTES:,} bytes", fix="load large data in code")
                )
            return raw.decode("utf-8-sig")
        except _RefusedError as refused:
            self.problems.append(Problem(refused.args[0], at, where))
        except UnicodeDecodeError as error:
            line = raw[: error.start].count(b"\n")
            column = error.start - (raw.rfind(b"\n", 0, error.start) + 1)
            fault = UnreadableYaml.fault(f"byte 0x{raw[error.start]:02x} is not UTF-8", fix="save the file as UTF-8")
            self.problems.append(Problem(fault, Origin(shown, line + 1, column + 1)))
        except (OSError, RuntimeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            self.problems.append(Problem(MissingFile.fault(f"{shown} cannot be read: {reason}"), at, where))
        return None

    def environment(self, environment: Mapping[str, str], base: Node) -> Node:
        """The layer of `SAFELOOP__SECTION__KEY=value`."""
        layer = Node({}, Origin("environment"))
        for name, text in sorted(environment.items()):
            if not name.startswith(PREFIX):
                continue
            shown = f"{name}={text}"
            key = Origin(name, column=1, width=len(name), text=shown)
            parts = name.removeprefix(PREFIX).split("__")
            if not all(parts) or len(parts) > MAX_DEPTH:
                fix = f"write {PREFIX}SECTION__KEY, as in {PREFIX}RUN__MAX_STEPS"
                self.problems.append(Problem(BadOverride.fault(f"{name} names no key", fix=fix), key))
                continue
            value = parse_value(text, name, shown, self.problems)
            if value is not None:
                layer = merge(layer, nested(tuple(spelled(parts, base)), value, key))
        return layer

    def overrides(self, overrides: Sequence[str]) -> Node:
        """The layer of `section.key=value`."""
        source = "command line"
        layer = Node({}, Origin(source))
        for shown in overrides:
            name, equals, text = shown.partition("=")
            parts = tuple(name.split("."))
            key = Origin(source, column=1, width=max(1, len(name)), text=shown)
            if (
                not equals
                or not all(part and part == part.strip() for part in parts)
                or name.startswith("-")
                or len(parts) > MAX_DEPTH
            ):
                fix = "write section.key=value without dashes or spaces, as in run.max_steps=100"
                self.problems.append(Problem(BadOverride.fault(f"{shown!r} is no override", fix=fix), key))
                continue
            value = parse_value(text, source, shown, self.problems)
            if value is not None:
                layer = merge(layer, nested(parts, value, key))
        return layer

    def keywords(self, sections: Mapping[str, object]) -> Node:
        """The layer of a Trainer's keywords."""
        found: dict[str, Node] = {}
        for name, value in sections.items():
            source = f"keyword {name}"
            try:
                found[name] = from_python(value, source, (name,))
            except ValueError as error:
                self.problems.append(
                    Problem(WrongType.fault(f"{name} is {error}", fix="flatten it"), Origin(source), name)
                )
        return Node(found, Origin("keywords"))


class _RefusedError(Exception):
    """Holds the fault of a file that is not read."""


def _shown(path: Path) -> str:
    whole = os.path.normpath(path)
    try:
        return str(Path(whole).relative_to(Path.cwd()))
    except ValueError:
        return whole


def _nearest_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {_shown(folder)}"
    names = sorted(f.name for f in folder.iterdir() if f.suffix in (".yaml", ".yml"))
    near = get_close_matches(path.name, names, 1, 0.5)
    return (
        f"did you mean {_shown(folder / near[0])}? " if near else ""
    ) + f"that folder holds {', '.join(names[:20]) or 'no YAML files'}"
