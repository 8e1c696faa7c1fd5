"""Writes a turn that was refused, or that failed, into a folder of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from safeloop import __version__
from safeloop.bundles.bundle import CONFIG, FILES, FORMAT, MANIFEST, TENSORS
from safeloop.bundles.random_state import packed_state
from safeloop.bundles.structure import NotStorable, pack, stored
from safeloop.faults import FaultError
from safeloop.folder import write_text
from safeloop.step.report import Frame
from safeloop.step.turn import Turn


def saver(
    root: Path, model: nn.Module, config: str, needs: tuple[str, ...]
) -> Callable[[Turn, Frame, Exception], Path | None]:
    """A function that writes a turn which ended in an error under `root`, as `write_bundle` does."""
    return lambda turn, frame, error: write_bundle(
        root, turn, frame, model=model, error=error, config=config, needs=needs
    )


def text_of(error: Exception) -> str:
    """What a bundle says of the error that it is about."""
    return str(error.fault) if isinstance(error, FaultError) else f"{type(error).__name__}: {error}"


def write_bundle(
    root: Path,
    turn: Turn,
    frame: Frame,
    *,
    model: nn.Module,
    error: Exception,
    config: str,
    needs: tuple[str, ...],
) -> Path | None:
    """A new folder `step-N` under `root`, readable by its user alone; None where the disk or the tensors refuse.

    The batch, the random state, the weights and buffers from before the update, the resolved config and the versions:
    all that `safeloop replay` needs. It is written when a run fails, so that it never raises itself.
    """
    folder = root / f"step-{frame.report.step}"
    tensors: dict[str, Tensor] = {}
    try:
        window, refused = _window(turn, tensors)
        state = {
            "format": FORMAT,
            "versions": {"safeloop": __version__, "torch": torch.__version__},
            "step": frame.report.step,
            "phase": turn.rerun.phase,
            "fault": text_of(error),
            "is_failed": not frame.gradients,
            "needs": list(needs),
            "window": window,
            "refused": refused,
            "random": packed_state(turn.random, tensors),
            "terms": list(frame.terms),
            "scale": None if turn.rerun.scale is None else float(turn.rerun.scale.value),
            "eval_modules": [name for name, module in model.named_modules() if not module.training],
        }
        tensors |= {f"term/{index}": stored(value) for index, value in enumerate(frame.terms.values())}
        tensors |= {f"weight/{name}": stored(value) for name, value in _weights(model).items()}
        _write(folder, state, tensors, config)
    except (OSError, RuntimeError, ValueError, TypeError):
        return None
    return folder


def _write(folder: Path, state: dict[str, Any], tensors: dict[str, Tensor], config: str) -> None:
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(mode=0o700)
    write_text(folder / CONFIG, config)
    safetensors.torch.save_file(tensors, str(folder / TENSORS))
    (folder / TENSORS).chmod(0o600)
    state["sha256"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}
    write_text(folder / MANIFEST, json.dumps(state, indent=1, allow_nan=False))


def _window(turn: Turn, tensors: dict[str, Tensor]) -> tuple[Any, str]:
    try:
        return [pack(batch, tensors, "batch") for batch in turn.window], ""
    except NotStorable as error:
        for name in [name for name in tensors if name.startswith("batch/")]:
            del tensors[name]
        return None, f"{error}, which a bundle cannot hold: it takes tensors, numbers, strings, lists, tuples, dicts"


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers; a tied one once."""
    return dict(model.named_parameters()) | dict(model.named_buffers())
