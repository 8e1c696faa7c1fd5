from __future__ import annotations

import pytest

from safeloop.checks import explain
from safeloop.checks.explain import SECTIONS, UnknownCodeError, nearest, page, render
from safeloop.checks.registry import FILES


@pytest.mark.parametrize("code", FILES)
def test_every_code_has_a_complete_page(code):
    shown = page(code)
    assert shown.summary.endswith(".")
    assert "\n\n" not in shown.summary
    assert tuple(heading for heading, _ in shown.sections) == SECTIONS
    assert all(body for _, body in shown.sections)
    assert shown.bad.language == shown.good.language
    assert shown.bad != shown.good


def test_a_page_tells_code_title_severity_and_class():
    shown = page("SL402")
    assert (shown.code, shown.name, shown.severity) == ("SL402", "TermIsAPythonNumber", "error")
    assert "min(0, y)" in shown.bad.text
    assert "torch.clamp(y, max=0)" in shown.good.text


def test_a_code_may_be_written_in_small_letters():
    assert page(" sl402 ") == page("SL402")


def test_an_unknown_code_names_the_nearest():
    with pytest.raises(UnknownCodeError, match=r"no code SL4O4; close to it: .*SL404") as caught:
        page("SL4O4")
    assert caught.value.nearest == nearest("SL4O4")
    assert "SL404" in caught.value.nearest


def test_nothing_is_near_to_nonsense():
    with pytest.raises(UnknownCodeError, match=r"^no code HELLO WORLD$"):
        page("hello world")


def test_a_rendered_page_is_markdown_with_its_code_blocks():
    text = render(page("SL402"))
    assert text.startswith("# SL402 loss term is a Python number\n\n")
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == list(SECTIONS)
    assert text.count("```python\n") == 2
    assert text.endswith("\n")


def test_a_page_without_all_sections_is_refused(tmp_path, monkeypatch):
    (tmp_path / "one.py").write_text(
        'class A:\n    """A.\n\n    ## Bad\n    x\n    """\n\n    code = "SL999"\n    title = "a"\n'
    )
    monkeypatch.setattr(explain, "_HERE", tmp_path)
    monkeypatch.setitem(explain.FILES, "SL999", "one.py")
    with pytest.raises(ValueError, match="SL999"):
        page("SL999")


def test_a_code_that_its_file_does_not_define_is_refused(tmp_path, monkeypatch):
    (tmp_path / "one.py").write_text("")
    monkeypatch.setattr(explain, "_HERE", tmp_path)
    monkeypatch.setitem(explain.FILES, "SL999", "one.py")
    with pytest.raises(ValueError, match="no check of code SL999"):
        page("SL999")
