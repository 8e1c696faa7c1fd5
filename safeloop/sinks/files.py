"""Files that only their owner can read: a config or a fault may quote paths and data."""

from __future__ import annotations

import os
from io import FileIO
from pathlib import Path


def append_to(path: Path) -> FileIO:
    """Open `path` for appending, unbuffered; a new file gets mode 0600, a new folder 0700.

    Nothing waits in a buffer, so that a forked data worker has nothing to write a second time when it ends.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return FileIO(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "ab")


def write_all(file: FileIO, data: bytes) -> None:
    """Write all of `data`. A raw file may take a part of it only, for instance just before the disk is full."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
