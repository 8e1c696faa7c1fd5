from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from safeloop.checks.registry import FILES

SCRIPT = Path(__file__).parents[2] / "scripts" / "rules.py"


@pytest.fixture(scope="module")
def rules():
    spec = importlib.util.spec_from_file_location("rules", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_published_pages_are_what_the_docstrings_say(rules):
    assert rules.stale(rules.ROOT / "docs") == []


def test_every_code_has_a_page_and_a_line_in_the_index(rules):
    documents = rules.documents()
    assert set(documents) == {"rules.md"} | {f"rules/{code}.md" for code in FILES}
    assert all(f"[{code}](rules/{code}.md)" in documents["rules.md"] for code in FILES)


def test_what_is_written_is_not_stale(rules, tmp_path):
    assert len(rules.stale(tmp_path)) == len(FILES) + 1
    rules.write(tmp_path)
    assert rules.stale(tmp_path) == []


def test_a_changed_a_missing_and_a_left_over_page_are_stale_and_mended(rules, tmp_path):
    rules.write(tmp_path)
    (tmp_path / "rules" / "SL201.md").write_text("old")
    (tmp_path / "rules" / "SL202.md").unlink()
    (tmp_path / "rules" / "SL000.md").write_text("gone")
    assert rules.stale(tmp_path) == ["rules/SL201.md", "rules/SL202.md", "rules/SL000.md"]
    rules.write(tmp_path)
    assert rules.stale(tmp_path) == []


def test_check_exits_with_1_where_a_page_is_missing(tmp_path):
    arguments = [sys.executable, "-W", "error", str(SCRIPT), "--docs", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    checked = subprocess.run([*arguments, "--check"], capture_output=True, text=True, env=environment)
    assert checked.returncode == 1
    assert "run scripts/rules.py" in checked.stderr
    subprocess.run(arguments, check=True, env=environment)
    subprocess.run([*arguments, "--check"], check=True, env=environment)
