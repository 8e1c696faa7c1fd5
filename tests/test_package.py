from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import safeloop

ROOT = Path(__file__).parents[1]


def run_python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *args], cwd=ROOT, capture_output=True, text=True, check=False
    )


def heavy_modules_after(code: str) -> set[str]:
    """Which of torch, numpy and tensorboard are imported once `code` has run in a new process."""
    probe = "import json, sys; print(json.dumps([m for m in ('torch', 'numpy', 'tensorboard') if m in sys.modules]))"
    done = run_python(f"{code}\n{probe}")
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_imports_no_torch():
    assert heavy_modules_after("import safeloop") == set()


def test_faults_are_usable_without_torch():
    assert heavy_modules_after("import safeloop as sl; sl.Fault('SL101', 'unknown key', 'x'); sl.FaultError") == set()


@pytest.mark.parametrize("name", safeloop.__all__)
def test_every_public_name_is_there(name):
    assert getattr(safeloop, name) is not None
    assert name in dir(safeloop)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'safeloop' has no attribute 'Trianer'"):
        safeloop.Trianer  # noqa: B018


@pytest.mark.parametrize(
    "first", ["import safeloop.audit", "import safeloop.trainer", "from safeloop.audit import audit", "import safeloop"]
)
def test_audit_is_the_function_whatever_was_imported_before(first):
    look = "import safeloop; from safeloop import audit; print(callable(audit), safeloop.audit is audit)"
    done = run_python(f"{first}\n{look}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "True"]


def test_the_package_says_that_it_is_typed():
    assert (Path(safeloop.__file__).parent / "py.typed").is_file()


def test_imports_point_down():
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_has_the_version_the_schema_and_the_type_marker(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"safeloop-{safeloop.__version__}-")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"safeloop/py.typed", "safeloop/schema/safeloop.schema.json", "safeloop/cli/main.py"} <= names
    assert not [name for name in names if name.startswith(("tests/", "examples/")) or name.endswith(".pyc")]
