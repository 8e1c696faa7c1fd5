from __future__ import annotations

import textwrap

import pytest

from safeloop.checks.explain import page
from safeloop.checks.source import Place, function_node, shown_path, term_lines, user_frame

SOURCE = textwrap.dedent(
    """\
    import torch


    class Run:
        @staticmethod
        def losses(batch):
            terms = {}
            if batch:
                total = 1.0
                total += 2.0
                return {"fit": total, "aux": batch.mean()}
            terms["fit"] = 0
            return terms

        def loss(self, batch):
            def helper(x):
                return x

            return helper(min(0, batch))


    run = lambda batch: batch.item()
    """
)


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user.py").write_text(SOURCE)
    return "user.py"


def texts(places):
    return [place.text for place in places]


def test_the_lines_that_make_a_term_of_a_dict_are_found(path):
    found = term_lines(f"{path}:5 in Run.losses", "fit")
    assert texts(found) == [
        "total = 1.0",
        "total += 2.0",
        'return {"fit": total, "aux": batch.mean()}',
        'terms["fit"] = 0',
        "return terms",
    ]


def test_another_term_has_its_own_line(path):
    assert 'return {"fit": total, "aux": batch.mean()}' in texts(term_lines(f"{path}:6 in Run.losses", "aux"))
    assert "total = 1.0" not in texts(term_lines(f"{path}:6 in Run.losses", "aux"))


def test_a_nested_function_is_not_the_loss_function(path):
    assert texts(term_lines(f"{path}:15 in Run.loss", "loss")) == ["return helper(min(0, batch))"]


def test_a_lambda_is_its_own_line(path):
    assert texts(term_lines(f"{path}:22 in <lambda>", "loss")) == ["run = lambda batch: batch.item()"]


@pytest.mark.parametrize("source", ["nowhere.py:3 in f", "somewhere", "user.py:1 in f", ""])
def test_a_place_that_cannot_be_read_has_no_lines(path, source):
    assert term_lines(source, "loss") == ()
    assert function_node(source) is None


def test_a_place_shows_a_relative_path_and_its_text(path, tmp_path):
    assert str(Place(str(tmp_path / path), 1, "module")) == "user.py:1 in module: `import torch`"
    assert shown_path("/elsewhere/user.py") == "/elsewhere/user.py"


class Caller(str):
    """Its method `strip` is called by safeloop, so that its frame lies below safeloop's."""

    def strip(self):
        raise KeyError("below")


def test_a_line_that_safeloop_called_is_the_user_s():
    with pytest.raises(KeyError) as caught:
        page(Caller("SL201"))
    frame, place = user_frame(caught.value.__traceback__)
    assert frame.f_code.co_name == "strip"
    assert place.text == 'raise KeyError("below")'


def test_a_line_that_called_safeloop_is_not():
    with pytest.raises(LookupError) as caught:
        page("SL999")
    assert user_frame(caught.value.__traceback__) is None


def test_a_line_of_a_loop_without_safeloop_is_the_user_s():
    with pytest.raises(ZeroDivisionError) as caught:
        divmod(1, 0)
    _, place = user_frame(caught.value.__traceback__)
    assert place.text == "divmod(1, 0)"


def test_a_line_is_quoted_as_it_is_now_not_as_it_was_when_it_was_read_first(tmp_path):
    path = tmp_path / "example.py"
    path.write_text("first = 1\n")
    assert Place(str(path), 1).text == "first = 1"
    path.write_text("second_line = 22\n")
    assert Place(str(path), 1).text == "second_line = 22"
