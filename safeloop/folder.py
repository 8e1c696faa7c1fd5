"""The folder of a run: never written twice, private to the user."""

from __future__ import annotations

import os
from pathlib import Path

import safetensors.torch
from torch import nn

from safeloop.checks.data.source import RunFolderUnwritable


def make_run_folder(root: Path, name: str) -> Path:
    """A new folder `root/name`, or `root/name-2` and so on where runs of that name exist.

    Raises:
        FaultError: SL856, the folder cannot be made.
    """
    number = 1
    while True:
        folder = root / (name if number == 1 else f"{name}-{number}")
        try:
            root.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700)
            return folder
        except FileExistsError:
            if not root.is_dir():
                raise _unwritable(root, "it is a file, not a folder") from None
            number += 1
        except OSError as error:
            raise _unwritable(folder, error.strerror or str(error)) from error


def write_text(path: Path, text: str) -> None:
    """`text` into a new file that only the user can read."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)


def save_weights(model: nn.Module, folder: Path, step: int, *, name: str = "model") -> Path:
    """Parameters and buffers into `model.safetensors`, tied ones once, `step` in its metadata; in one move."""
    path, draft = folder / f"{name}.safetensors", folder / f".{name}.safetensors.draft"
    safetensors.torch.save_model(model, str(draft), metadata={"step": str(step)})
    draft.chmod(0o600)
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    draft.replace(path)
    return path


def _unwritable(path: Path, reason: str) -> Exception:
    return RunFolderUnwritable.error(
        f"the run folder {path} cannot be made: {reason}",
        where="run.dir",
        fix="set `run.dir` to a folder that you can write",
    )
