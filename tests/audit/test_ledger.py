"""The ledger: each fault once with a count, accepted ones not at all, errors raised with all others."""

from __future__ import annotations

import pytest

from safeloop.audit import FaultLedger
from safeloop.faults import Fault, FaultError


def fault(code: str = "SL201", where: str = "here", severity: str = "warning", names: tuple[str, ...] = ()) -> Fault:
    return Fault(code, "title", "what", where, severity=severity, names=names)  # type: ignore[arg-type]


def test_a_fault_is_kept_once_with_a_count() -> None:
    ledger = FaultLedger()
    told: list[tuple[str, int]] = []
    ledger.listener = lambda fault, step, count: told.append((fault.code, step))
    for step in range(3):
        ledger.add([fault()], step)
    assert len(ledger.faults) == 1
    assert list(ledger.counts.values()) == [3]
    assert told == [("SL201", 0)]


def test_a_fault_of_every_step_is_one_fault() -> None:
    ledger = FaultLedger()
    for step in range(3):
        ledger.add(
            [fault(where=f"net.py:7; iteration {step}"), fault("SL501", f"step {step}, before SGD.step()")], step
        )
    assert [found.where for found in ledger.faults] == ["net.py:7; iteration 0", "step 0, before SGD.step()"]
    assert list(ledger.counts.values()) == [3, 3]


def test_the_first_error_is_raised_with_all_others() -> None:
    ledger = FaultLedger()
    warning, error, more = fault("SL101"), fault("SL202", severity="error"), fault("SL203", severity="error")
    with pytest.raises(FaultError) as caught:
        ledger.add([warning, error, more])
    assert caught.value.fault is error
    assert caught.value.others == (warning, more)
    assert ledger.faults == (warning, error, more)


def test_a_fault_is_accepted_only_where_every_name_matches() -> None:
    ledger = FaultLedger({"SL201": ["head.*"], "SL202": ["*"]})
    assert ledger.accepts(fault(names=("head.weight", "head.bias")))
    assert not ledger.accepts(fault(names=("head.weight", "body.weight")))
    assert not ledger.accepts(fault(names=()))
    assert ledger.accepts(fault("SL202"))
    ledger.add([fault("SL202", severity="error")])
    assert ledger.faults == ()
