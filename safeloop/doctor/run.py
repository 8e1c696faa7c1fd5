"""Reads what a run left in its folder: finished, running or killed, whole or damaged."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from safeloop.checks.data.run_folder import RunFolderUnreadable
from safeloop.doctor.series import Series
from safeloop.sinks.jsonl import FILE

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_LARGEST_STEP = 2**63
_OTHER_KEYS = frozenset({"kind", "step", "epoch", "wall_time"})


@dataclass(frozen=True, slots=True)
class RecordedFault:
    """A fault as `metrics.jsonl` has it."""

    code: str
    title: str
    what: str
    where: str
    why: str
    fix: str
    severity: str
    step: int
    count: int


@dataclass(frozen=True, slots=True)
class Run:
    """What the rules look at."""

    path: Path
    series: Mapping[str, Series] = field(default_factory=dict)
    faults: tuple[RecordedFault, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    is_finished: bool = False
    """whether it saved its weights, as every run does that ends by itself"""
    num_bad_lines: int = 0
    """lines that are no record; a killed run may leave one"""

    def get(self, tag: str) -> Series:
        """The series of a tag, empty where the run has none."""
        return self.series.get(tag, Series(tag, (), ()))

    def under(self, prefix: str) -> dict[str, Series]:
        """Name -> series, for the tags that begin with `prefix`."""
        return {tag.removeprefix(prefix): one for tag, one in self.series.items() if tag.startswith(prefix)}

    @property
    def steps(self) -> tuple[int, ...]:
        """Every step that has a record."""
        return tuple(sorted({step for series in self.series.values() for step in series.steps}))

    @property
    def owners(self) -> tuple[str, ...]:
        """The optimizers that logged gradient norms."""
        names = (name.rsplit("/", 1)[0] for name in self.under("grad/"))
        return tuple(dict.fromkeys(name for name in names if name != "total"))

    def setting(self, *keys: str) -> str:
        """`optimizers.main.lr (now 30.0)`, or the path alone where the config does not say."""
        value = self.value(*keys)
        return ".".join(keys) + ("" if value is None or isinstance(value, dict | list) else f" (now {value})")

    def value(self, *keys: str) -> Any:
        """What the config says there, else None."""
        found: Any = self.config
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found


def read_run(path: str | Path) -> Run:
    """The run in a folder, or that of a `metrics.jsonl`. Lines that are no record are counted and left out.

    Raises:
        FaultError: SL865, there is nothing to read.
    """
    given = Path(path)
    try:
        file = given if given.is_file() else given / FILE
        text = _text(given, file)
        records, faults, num_bad = _parsed(text)
        if not records and not faults:
            problem = "is empty" if not text.strip() else f"has no record in {num_bad} lines"
            raise RunFolderUnreadable.of(given, f"{file.name} {problem}")
        weights = file.parent / "model.safetensors"
        return Run(given, _series(records), _last(faults), _config(file.parent), weights.exists(), num_bad)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise RunFolderUnreadable.of(given, str(getattr(error, "strerror", None) or error)) from error


def _text(given: Path, file: Path) -> str:
    if not given.exists():
        raise RunFolderUnreadable.of(given, "there is nothing of that name")
    if not file.is_file():
        raise RunFolderUnreadable.of(given, f"it has no {FILE}")
    return file.read_bytes().decode("utf-8", errors="replace")


def _parsed(text: str) -> tuple[list[dict[str, Any]], list[RecordedFault], int]:
    records: list[dict[str, Any]] = []
    faults: list[RecordedFault] = []
    num_bad = 0
    for line in text.split("\n"):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):  # ValueError: also an integer of thousands of digits
            found = None
        if not isinstance(found, dict) or not _is_step(found.get("step")):
            num_bad += 1
        elif found.get("kind") in ("train", "eval"):
            records.append(found)
        elif found.get("kind") == "fault":
            faults.append(_fault(found))
    return records, faults, num_bad


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST_STEP


def _fault(found: Mapping[str, Any]) -> RecordedFault:
    count, (code, title, what, where, why, fix, severity) = found.get("count"), _texts(found)
    times = count if isinstance(count, int) and count > 0 else 1
    return RecordedFault(code, title, what, where, why, fix, severity, found["step"], times)


def _texts(found: Mapping[str, Any]) -> list[str]:
    return [str(found.get(key) or "") for key in ("code", "title", "what", "where", "why", "fix", "severity")]


def _last(faults: list[RecordedFault]) -> tuple[RecordedFault, ...]:
    """Each fault once: at the step of its first line, with the count of its last."""
    kept: dict[tuple[str, str, str], RecordedFault] = {}
    for fault in faults:
        key = (fault.code, fault.what, fault.where)
        first = kept.get(key, fault)
        kept[key] = replace(fault, step=first.step, count=max(first.count, fault.count))
    return tuple(kept.values())


def _series(records: list[dict[str, Any]]) -> dict[str, Series]:
    """Tag -> series; where a step was written twice (a run that was continued), the later line counts."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        for tag, number in _numbers(record):
            found.setdefault(tag, {})[record["step"]] = number
    return {
        tag: Series(tag, tuple(sorted(by_step)), tuple(by_step[step] for step in sorted(by_step)))
        for tag, by_step in found.items()
    }


def _numbers(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for tag, value in record.items():
        if tag in _OTHER_KEYS or isinstance(value, bool):
            continue
        if isinstance(value, int | float):
            try:
                yield tag, float(value)
            except OverflowError:
                yield tag, math.inf if value > 0 else -math.inf
        elif isinstance(value, str) and value in _NOT_FINITE:
            yield tag, _NOT_FINITE[value]


def _config(folder: Path) -> Mapping[str, Any]:
    """What `config.yaml` says; nothing where it is missing or damaged: it only helps to name paths and values."""
    try:
        found = yaml.safe_load((folder / "config.yaml").read_bytes())
    except Exception:  # yaml lets through what its constructors raise: ValueError, OverflowError, AttributeError, ...
        return {}
    return found if isinstance(found, dict) else {}
