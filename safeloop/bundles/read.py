"""Reads a bundle: nothing is parsed before its checksum holds, and nothing in it is ever run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from safeloop.bundles.bundle import FILES, FORMAT, MANIFEST, TENSORS, Bundle
from safeloop.bundles.random_state import unpacked_state
from safeloop.bundles.structure import unpack
from safeloop.checks.data.bundles import BundleDamaged
from safeloop.faults import FaultError

MAX_MANIFEST = 50_000_000


def read_bundle(path: Path) -> Bundle:
    """The bundle in a folder.

    Raises:
        FaultError: SL861, a file is missing, is no plain file, or is not what was written.
    """
    state = _manifest(path)
    content = {name: _checked(path, name, state) for name in FILES}
    try:
        tensors = safetensors.torch.load(content[TENSORS])
        return _bundle(path, state, tensors)
    except (SafetensorError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise _damaged(path, f"its content does not fit together ({type(error).__name__}: {error})") from None


def _bundle(path: Path, state: dict[str, Any], tensors: dict[str, Tensor]) -> Bundle:
    window = state["window"]
    prefix = "weight/"
    return Bundle(
        path=path,
        step=int(state["step"]),
        phase=str(state["phase"]),
        fault=str(state["fault"]),
        is_failed=bool(state.get("is_failed", False)),
        needs=tuple(map(str, state["needs"])),
        weights={name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)},
        eval_modules=tuple(map(str, state["eval_modules"])),
        window=None if window is None else [unpack(batch, tensors) for batch in window],
        refused=str(state["refused"]),
        random=unpacked_state(state["random"], tensors),
        terms={str(name): tensors[f"term/{index}"] for index, name in enumerate(state["terms"])},
        scale=None if state["scale"] is None else float(state["scale"]),
        versions={str(name): str(value) for name, value in state["versions"].items()},
    )


def _manifest(path: Path) -> dict[str, Any]:
    raw = _bytes(path, MANIFEST)
    if len(raw) > MAX_MANIFEST:
        raise _damaged(path, f"`{MANIFEST}` has {len(raw)} bytes")
    try:
        state = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"`{MANIFEST}` is not JSON: {error}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise _damaged(path, f"`{MANIFEST}` is not one of format {FORMAT}")
    return state


def _checked(path: Path, name: str, state: dict[str, Any]) -> bytes:
    raw = _bytes(path, name)
    sums = state.get("sha256")
    if not isinstance(sums, dict) or hashlib.sha256(raw).hexdigest() != sums.get(name):
        raise _damaged(path, f"`{name}` has another checksum than the manifest says")
    return raw


def _bytes(path: Path, name: str) -> bytes:
    file = path / name
    try:
        if file.is_symlink() or not file.is_file():
            raise _damaged(path, f"`{name}` is missing or no plain file")
        return file.read_bytes()
    except OSError as error:
        raise _damaged(path, f"`{name}` cannot be read: {error.strerror}") from None


def _damaged(path: Path, what: str) -> FaultError:
    return BundleDamaged.error(
        f"{path} is no intact bundle: {what}",
        where=str(path),
        fix="copy the whole folder again from where it was written: `bundles/step-N` in the folder of the run",
    )
