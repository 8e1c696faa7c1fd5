from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STEPS = range(10, 410, 10)
"""forty records, every ten steps"""
CONFIG = """\
run: {max_steps: 400, precision: fp32}
optimizers: {main: {type: SGD, lr: 0.1, max_norm: 1.0, scheduler: {type: StepLR, step_size: 30}}}
losses: {a: {weight: 1.0}, b: {weight: 0.5}}
nonfinite: {policy: skip}
"""


def wobble(step: int) -> float:
    """Noise that is the same each time, between -1 and 1."""
    return math.sin(12.9898 * step) * math.cos(78.233 * step)


def healthy(step: int) -> dict[str, Any]:
    """A record of a run in which nothing is wrong."""
    loss = 2.0 * math.exp(-step / 120) + 0.1 + 0.03 * wobble(step)
    return {
        "loss/train": loss,
        "loss/a": 0.8 * loss,
        "loss/b": 0.4 * loss,
        "grad/main/pre_clip": 1.5 * loss,
        "grad/main/post_clip": min(1.0, 1.5 * loss),
        "grad/main/max_since_last": 2 * loss,
        "grad/main/clip_fraction": 1.0 if step < 100 else 0.1,
        "grad/total/pre_clip": 1.5 * loss,
        "optim/lr/main": 0.1 * (1 - step / 400),
        "perf/samples_per_s": 5000 + 500 * wobble(step),
        "perf/step_ms": 10.0,
        "loss_grad/a": 1.0 * loss,
        "loss_grad/b": 0.3 * loss,
        "loss_cos/a~b": 0.2 + 0.3 * wobble(step),
        "module/grad_norm/body": loss,
        "module/grad_norm/mid": 0.5 * loss,
        "module/grad_norm/head": 0.1 * loss,
        "safety/skipped_total": 0.0,
        "safety/faults_total": 0.0,
    }


def evaluated(step: int) -> dict[str, Any]:
    return {"loss/eval": 2.0 * math.exp(-step / 120) + 0.2, "metric/accuracy": 0.9 - math.exp(-step / 100)}


def number(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def line(kind: str, step: int, **tags: Any) -> str:
    head = {"kind": kind, "step": step, "epoch": step // 100, "wall_time": 1.0 + step}
    return json.dumps(head | {tag: number(value) for tag, value in tags.items()}) + "\n"


@pytest.fixture
def run_of(tmp_path: Path) -> Callable[..., Path]:
    """Writes a healthy run of 400 steps with some tags of it changed: a number, or a function of the step."""

    def write(
        *,
        evals: dict[str, Any] | None = None,
        faults: str = "",
        config: str = CONFIG,
        is_finished: bool = True,
        **tags: Any,
    ) -> Path:
        text = ""
        for step in STEPS:
            changed = {tag: made(step) if callable(made) else made for tag, made in tags.items()}
            text += line("train", step, **{tag: v for tag, v in (healthy(step) | changed).items() if v is not None})
            if step % 40 == 0:
                text += line(
                    "eval", step, **(evaluated(step) | {tag: made(step) for tag, made in (evals or {}).items()})
                )
        (tmp_path / "metrics.jsonl").write_text(text + faults)
        (tmp_path / "config.yaml").write_text(config)
        if is_finished:
            (tmp_path / "model.safetensors").write_bytes(b"")
        return tmp_path

    return write
