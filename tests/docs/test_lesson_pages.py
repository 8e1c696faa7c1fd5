"""Every page under docs/lessons/ is run, and shows exactly what its code prints."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
LESSONS = ROOT / "docs" / "lessons"
PAGES = sorted(LESSONS.glob("[0-9]*.md"))
HEADINGS = ["What PyTorch does", "What safeloop says", "The right way"]


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("lessons", ROOT / "scripts" / "lessons.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_shows_what_its_code_prints(page: Path, script: Any, folder: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert script.rewritten(text) == text, "python scripts/lessons.py brings the page up to date"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_shows_both_sides_and_the_right_way_and_hides_no_block(page: Path, script: Any) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# {int(page.stem[:2])}. ")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == HEADINGS
    examples = [match[0] for match in script.EXAMPLE.finditer(text)]
    assert len(examples) >= 2
    assert text.count("```") == sum(example.count("```") for example in examples)
    assert max(map(len, text.splitlines())) <= 125


def test_the_index_has_a_line_for_each_page() -> None:
    lines = re.findall(r"^(\d+)\. \[.+\]\((\S+)\): ", (LESSONS / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [(int(number), name) for number, name in lines] == [(int(page.stem[:2]), page.name) for page in PAGES]


def test_output_that_has_changed_and_output_that_is_missing_are_written(script: Any, folder: Path) -> None:
    code = "```python\nx = 1\nprint(x + 1)\n```\n"
    page = f"{code}\n```text\n3\n```\n\nThen.\n\n```python\nprint(x)\n```\n"
    right = f"{code}\n```text\n2\n```\n\nThen.\n\n```python\nprint(x)\n```\n\n```text\n1\n```\n"
    assert script.rewritten(page) == right
    assert script.rewritten(right) == right


def test_a_block_sees_its_place_in_the_whole_file(script: Any, folder: Path) -> None:
    code = "import sys\nprint(sys._getframe().f_lineno)"
    shown = script.rewritten(f"```python\n\n\n{code}\n```\n\n```python\n{code}\n```\n")
    assert re.findall(r"^\d+$", shown, re.MULTILINE) == ["4", "6"]


@pytest.mark.parametrize("arguments", [["--check"], []])
def test_a_stale_page_is_named_and_written_only_where_asked(
    arguments: list[str],
    script: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = tmp_path / "01-one.md"
    page.write_text("```python\nprint(1)\n```\n")
    monkeypatch.setattr(script, "PAGES", tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert script.main(arguments) == len(arguments)
    assert "01-one.md" in capsys.readouterr().out
    assert ("```text\n1\n```" in page.read_text()) is not bool(arguments)
    assert script.main(arguments) == len(arguments)
