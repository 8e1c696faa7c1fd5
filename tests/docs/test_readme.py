"""README.md is run from top to bottom, as a stranger would type it."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from typer.testing import CliRunner

from safeloop.cli.main import app
from safeloop.config import ConfigError, load
from safeloop.faults import exit_code
from safeloop.sinks.tensorboard import dashboard_text

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
SET_UP = "python3 -m venv .venv && . .venv/bin/activate"
NUMBER = re.compile(r"\d[\d,.:]*(?:e[+-]\d+)?")


class Block(NamedTuple):
    line: int
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page; `line` is that of the opening fence."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(text.count("\n", 0, match.start()) + 1, *match.groups()) for match in found]


class Reader:
    """Types what a page says, block by block, and compares the output that it shows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = ""
        self.refused: set[str] = set()
        self._names: dict[str, Any] = {"__name__": "__main__"}

    def read(self, block: Block) -> None:
        getattr(self, f"_{block.language}")(block.text)

    def _python(self, text: str) -> None:
        (self.folder / "example.py").write_text(text, encoding="utf-8")
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            exec(compile(text, "example.py", "exec"), self._names)
        self.output = shown.getvalue()

    def _yaml(self, text: str) -> None:
        name = text.splitlines()[0].removeprefix("# ")
        Path(name).write_text(text, encoding="utf-8")
        try:
            loaded = load(name, environment={})
        except ConfigError:
            self.refused.add(name)
        else:
            assert not loaded.warnings

    def _toml(self, text: str) -> None:
        ours = Path("pyproject.toml").read_text(encoding="utf-8").splitlines()
        assert set(text.splitlines()) <= set(ours)

    def _sh(self, text: str) -> None:
        self.output = ""
        for line in text.splitlines():
            command = line.partition("  #")[0].rstrip()
            if command != SET_UP:
                getattr(self, f"_run_{shlex.split(command)[0]}")(command)

    def _run_make(self, command: str) -> None:
        target = command.removeprefix("make ")
        assert re.search(rf"^{target}: ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        if shutil.which("make"):
            made = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True)
            assert ".venv/bin/" in made.stdout

    def _run_pip(self, command: str) -> None:
        arguments = shlex.split(command)[2:]
        if arguments[0] == "-c":
            assert (ROOT / arguments[1]).is_file()
            assert arguments[2:] == ["-e", ".[examples]"]
        else:
            (pin,) = arguments
            assert pin in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()

    def _run_safeloop(self, command: str) -> None:
        arguments = shlex.split(command)[1:]
        done = CliRunner().invoke(app, arguments)
        self.output += done.output
        is_refused = len(self.refused.intersection(arguments)) > 0
        assert done.exit_code == (2 if is_refused else 0), done.output
        self.refused.difference_update(arguments)

    def _run_tensorboard(self, command: str) -> None:
        assert command == dashboard_text(Path("runs/digits")).splitlines()[0]

    def _text(self, text: str) -> None:
        assert text.strip(), "the shown output is empty"
        if "samples/s" in text:
            assert NUMBER.sub("#", text.strip()) in NUMBER.sub("#", self.output)
        else:
            assert text.rstrip() in self.output


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    """In a folder that has of the checkout what the README uses."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("NO_COLOR", "1")
    torch.manual_seed(0)
    return Reader(tmp_path)


def test_every_block_runs_and_shows_what_it_says(reader: Reader) -> None:
    for block in blocks(README):
        try:
            reader.read(block)
        except Exception as error:
            raise AssertionError(f"README.md:{block.line}: {error}") from error
    assert not reader.refused, "a config with a mistake must be followed by the error that it gives"


def test_every_fence_is_a_block_that_is_run() -> None:
    fences = README.read_text(encoding="utf-8").count("```")
    assert fences == 2 * len(blocks(README))
    assert {block.language for block in blocks(README)} == {"python", "yaml", "toml", "sh", "text"}


def test_every_link_leads_to_a_file() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8"))
    assert "docs/dashboard.png" in targets
    missing = [target for target in targets if "://" not in target and not (ROOT / target).exists()]
    assert not missing


def test_every_code_has_a_page() -> None:
    for code in set(re.findall(r"\bSL\d{3}\b", README.read_text(encoding="utf-8"))):
        assert CliRunner().invoke(app, ["explain", code]).exit_code == 0


def test_the_exit_codes_are_those_of_the_command() -> None:
    rows = dict(re.findall(r"^\| (\d+) \| (.+) \|$", README.read_text(encoding="utf-8"), re.MULTILINE))
    epilog = app.info.epilog or ""
    assert all(f"{code} {meaning}" in epilog for code, meaning in rows.items())
    assert {str(exit_code(code)) for code in ("SL101", "SL201", "SL851")} < rows.keys()


def test_the_picture_is_small_and_a_picture() -> None:
    picture = (ROOT / "docs" / "dashboard.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 300_000
