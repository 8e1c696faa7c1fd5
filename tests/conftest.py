"""What holds for every test."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if os.environ.get("SAFELOOP_TEST_DEVICE") != "cuda":  # a run with `device: auto` is compared with loops on the CPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from torch import nn
from torch._dynamo import eval_frame

import safeloop as sl
from safeloop.autograd.tape import Tape

programs = str(Path(sys.executable).parent)
if programs not in os.environ["PATH"].split(os.pathsep):  # as in an environment that is activated
    os.environ["PATH"] = os.pathsep.join([programs, os.environ["PATH"]])

Program = tuple[nn.Module, Callable[[int], Any]]
"""A model, and a function of the iteration that computes its loss, or its loss terms by name."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a device that is not there."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device and `make test-cuda`"))


def pytest_collection_finish() -> None:
    """What is imported and collected stays: out of the collector's sight, where each audit looks for what is alive."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_listener_breaks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Errors of our own listeners are swallowed in a run; in a test they are not."""
    tapes: list[Tape] = []
    build = Tape.__init__

    def noted(tape: Tape, *args: Any, **options: Any) -> None:
        build(tape, *args, **options)
        tapes.append(tape)

    monkeypatch.setattr(Tape, "__init__", noted)
    yield
    if any(backend is not None for backend in eval_frame.cached_backends.values()):
        torch._dynamo.reset()  # the audit keeps its tape off while something is compiled
    broken = [error for tape in tapes for error in tape.broken]
    assert not broken, broken


@pytest.fixture
def audited() -> Callable[..., list[sl.Fault]]:
    """Runs a program in a plain loop inside `sl.audit`; returns its faults."""

    def run(make: Callable[[], Program], steps: int = 8, lr: float = 1e-3, level: str = "standard") -> list[sl.Fault]:
        torch.manual_seed(0)
        model, step = make()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=lr)
        with sl.audit(model=model, optimizers=optimizer, on_fault="collect", level=level) as audit:
            for i in range(steps):
                optimizer.zero_grad()
                terms = step(i)
                loss = sum(terms.values()) if isinstance(terms, dict) else terms
                loss.backward()
                optimizer.step()
                audit.step()
        return list(audit.faults)

    return run


@pytest.fixture
def trained(tmp_path: Path) -> Callable[..., list[sl.Fault]]:
    """Runs the same program in a Trainer; returns its faults, raised ones too."""

    def run(make: Callable[[], Program], steps: int = 8, lr: float = 1e-3, level: str = "standard") -> list[sl.Fault]:
        torch.manual_seed(0)
        model, step = make()

        class Run(sl.Trainer):
            def losses(self, batch: torch.Tensor) -> Any:
                terms = step(int(batch[0]))
                return terms if isinstance(terms, dict) else {"loss": terms}

        trainer = Run(
            model=model,
            data=[torch.tensor([i]) for i in range(steps)],
            optimizers={"type": "Adam", "lr": lr},
            run={"dir": str(tmp_path / "runs"), "max_steps": steps, "device": "cpu"},
            audit={"level": level},
            log={"sinks": []},
        )
        try:
            trainer.fit()
        except sl.FaultError as error:
            return list(dict.fromkeys([*trainer.faults, error.fault, *error.others]))
        return list(trainer.faults)

    return run
