from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys

import pytest

import safeloop.checks
from safeloop.checks.check import Check
from safeloop.checks.registry import FILES


def every_check() -> list[type[Check]]:
    for module in pkgutil.walk_packages(safeloop.checks.__path__, "safeloop.checks."):
        importlib.import_module(module.name)
    waiting, found = [Check], []
    while waiting:
        cls = waiting.pop()
        found += [cls] if "code" in vars(cls) and cls not in found else []  # one may have two bases
        waiting += cls.__subclasses__()
    return [cls for cls in found if cls.__module__.startswith("safeloop.checks.")]


def test_the_table_and_the_classes_agree():
    defined = {
        cls.code: cls.__module__.removeprefix("safeloop.checks.").replace(".", "/") + ".py" for cls in every_check()
    }
    assert defined == FILES


def test_no_code_is_used_twice():
    codes = [cls.code for cls in every_check()]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize("code", FILES)
def test_a_code_is_well_formed(code):
    assert re.fullmatch(r"SL[1-9]\d{2}", code)


def test_every_check_has_a_title_of_its_own():
    titles = [cls.title for cls in every_check()]
    assert all(titles)
    assert len(titles) == len(set(titles))


def test_explaining_a_code_does_not_import_torch():
    script = (
        "import sys; from safeloop.checks.explain import page, render; from safeloop.checks.registry import FILES\n"
        "for code in FILES: render(page(code))\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)
