"""Writing to the disk, piece by piece if it must be."""

from __future__ import annotations

from io import FileIO
from pathlib import Path

from safeloop.sinks.files import append_to, write_all


class Stingy(FileIO):
    """Takes three bytes at a time, as a raw file may."""

    def write(self, data: bytes | memoryview, /) -> int:
        return super().write(bytes(data)[:3])


def test_all_bytes_arrive_where_each_call_takes_only_a_few(tmp_path: Path) -> None:
    with Stingy(tmp_path / "file", "wb") as file:
        write_all(file, b"0123456789")
        write_all(file, b"")

    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_what_stands_in_a_file_stays(tmp_path: Path) -> None:
    for text in (b"one", b"two"):
        with append_to(tmp_path / "folder" / "file") as file:
            write_all(file, text)

    assert (tmp_path / "folder" / "file").read_bytes() == b"onetwo"
