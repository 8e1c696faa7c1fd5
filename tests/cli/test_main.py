from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import safeloop as package

PROBE = """
import atexit, json, sys
atexit.register(lambda: print("\\n" + json.dumps("torch" in sys.modules)))
from safeloop.cli.main import main
main()
"""


def run(*args: str, code: str = PROBE, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", code, *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--help"], ["explain", "SL101"], ["schema"], ["doctor", "--help"], ["--version"]],
)
def test_what_needs_no_model_leaves_torch_out(arguments):
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) is False


def test_completion_leaves_torch_out_and_knows_the_codes():
    done = run(_SAFELOOP_COMPLETE="complete_bash", COMP_WORDS="safeloop explain SL40", COMP_CWORD="2")
    assert done.returncode == 0, done.stderr
    *codes, torch_is_there = done.stdout.split()
    assert json.loads(torch_is_there) is False
    assert {"SL401", "SL404"} <= set(codes)


def test_no_arguments_show_the_help(safeloop):
    done = safeloop()
    text = done.stdout + done.stderr
    assert "Usage" in text
    for command in ("train", "check", "plan", "explain", "schema"):
        assert command in text


def test_the_version_is_printed(safeloop):
    assert safeloop("--version").stdout == f"safeloop {package.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["trian"], ["train"], ["train", "x.yaml", "--log-format", "xml"], ["plan", "--nope"]]
)
def test_wrong_usage_exits_2_on_stderr(arguments, safeloop):
    done = safeloop(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "Usage" in done.stderr


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "safeloop", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"safeloop {package.__version__}\n"


def test_an_output_that_cannot_print_a_letter_shows_its_code(tmp_path):
    file = tmp_path / "caf\u00e9.json"
    done = run(
        "schema", "--output", str(file), code="from safeloop.cli.main import main; main()", PYTHONIOENCODING="ascii"
    )
    assert done.returncode == 0, done.stderr
    assert "caf\\xe9.json" in done.stdout
    assert file.is_file()


def test_a_reader_that_closes_early_sees_no_traceback():
    command = [sys.executable, "-m", "safeloop", "schema"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
