from __future__ import annotations

from pathlib import Path

import pytest

from safeloop.sinks.record import RunInfo

MODULES = ("encoder.0", "encoder.2", "head")


@pytest.fixture
def run(tmp_path: Path) -> RunInfo:
    return RunInfo(
        name="digits",
        dir=tmp_path / "runs" / "digits",
        max_steps=2000,
        plan="phase train x1\n  1 zero       main",
        config="run: {name: digits}\n",
        owners=("main",),
        modules=MODULES,
        hparams={"lr": 1e-3, "seed": 3, "fused": True, "type": "AdamW"},
    )
