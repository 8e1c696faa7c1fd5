from __future__ import annotations

import pytest

from safeloop.checks.registry import FILES


@pytest.mark.parametrize("code", FILES)
def test_every_code_has_a_page(code, safeloop):
    done = safeloop("explain", code)
    assert (done.exit_code, done.stderr) == (0, "")
    assert code in done.stdout
    for heading in ("What it does", "Why it is bad", "Bad", "Good", "Fix", "Source"):
        assert heading in done.stdout


def test_a_code_may_be_written_small(safeloop):
    assert safeloop("explain", "sl404").stdout == safeloop("explain", "SL404").stdout


def test_an_unknown_code_is_a_usage_error_that_names_the_nearest(safeloop):
    done = safeloop("explain", "SL444")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "SL404" in done.stderr or "SL4" in done.stderr


def test_a_word_that_is_no_code_is_a_usage_error(safeloop):
    done = safeloop("explain", "nonsense")
    assert done.exit_code == 2
    assert "SL101" in done.stderr
