"""Planted faults: the right line and the right trap; and programs whose infinities are meant."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

import safeloop as sl

pytestmark = pytest.mark.filterwarnings("ignore:std")
FILE = Path(__file__).parent / "planted.py"
_spec = importlib.util.spec_from_file_location("planted_faults", FILE)
planted = importlib.util.module_from_spec(_spec)
sys.modules["planted_faults"] = planted
_spec.loader.exec_module(planted)


def fault_of(case, **sections):
    settings = {"run": {"max_steps": 1}, "log": {"sinks": []}, "optimizers": {"type": "SGD", "lr": 0.1}}
    settings |= case.settings | sections
    with pytest.raises(sl.FaultError) as caught:
        case(model=case.net(), data=list(case.data) * 2, **settings).fit()
    return caught.value.fault


def guilty_line(case):
    lines = FILE.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"class {case.__name__}("))
    wanted = [i + 1 for i, line in enumerate(lines) if line.endswith("# born here")]
    own_end = next((i for i in range(start + 1, len(lines)) if lines[i].startswith("class ")), len(lines))
    inside = [line for line in wanted if start < line <= own_end]
    return inside[0] if inside else max(line for line in wanted if line <= start)


@pytest.mark.parametrize("case", planted.PLANTED, ids=lambda case: case.__name__)
def test_the_guilty_line_is_named(case, capsys):
    fault = fault_of(case)
    print(fault)
    assert f"planted.py:{guilty_line(case)} " in fault.where, str(fault)


@pytest.mark.parametrize("case", planted.PLANTED, ids=lambda case: case.__name__)
def test_the_trap_is_explained(case):
    from safeloop.nonfinite.trap_table import TRAPS

    fault = fault_of(case)
    trap = next(trap for trap in TRAPS if trap.name == case.trap)
    assert trap.why.partition("{")[0][:30] in fault.why, str(fault)


def test_there_are_enough_of_them():
    assert len(planted.PLANTED) >= 20
