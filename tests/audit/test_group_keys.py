"""Keys of parameter groups that nobody reads, beside keys that the program itself applies."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

import safeloop as sl

HEAD = """
import torch
from torch import nn
from torch.optim import SGD, AdamW, lr_scheduler


def net():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def loop(model, optimizer, watch, times=24, before=None, after=None):
    with watch(model, optimizer) as audit:
        for i in range(times):
            if before is not None:
                before(i)
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            if after is not None:
                after(i)
            audit.step()

"""
IGNORED = {
    "layer_decay": """
def run(watch):
    model = net()
    groups = [{"params": m.parameters(), "lr_scale": 0.65 ** i} for i, m in enumerate([model[2], model[0]])]
    loop(model, AdamW(groups, lr=0.01), watch)
""",
    "short_watch": """
def run(watch):
    model = net()
    groups = [dict(params=model[0].parameters(), lr_mult=0.1), dict(params=model[2].parameters())]
    loop(model, SGD(groups, lr=0.01), watch, times=12)
""",
    "decay_of_biases": """
def run(watch):
    model = net()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    loop(model, AdamW([{"params": decayed}, {"params": others, "wd_mult": 0.0}], lr=0.01), watch)
""",
    "decay_under_another_name": """
def run(watch):
    model = net()
    loop(model, SGD([{"params": model.parameters(), "wd": 1e-4}], lr=0.01), watch)
""",
}
APPLIED = {
    "by_the_loop_before_each_step": """
def run(watch):
    model = net()
    groups = [{"params": model[0].parameters(), "lr_scale": 0.1}, {"params": model[2].parameters()}]
    optimizer = AdamW(groups, lr=0.01)

    def warm(i):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * min(1, (i + 1) / 10) * group.get("lr_scale", 1.0)

    loop(model, optimizer, watch, before=warm)
""",
    "at_the_end_of_a_long_epoch": """
def run(watch):
    model = net()
    groups = [{"params": model[0].parameters(), "lr_mult": 0.1}, {"params": model[2].parameters(), "lr_mult": 1.0}]
    optimizer = SGD(groups, lr=0.01)

    def decay(i):
        if i == 30:
            for group in optimizer.param_groups:
                group["lr"] = 0.001 * group["lr_mult"]

    loop(model, optimizer, watch, times=40, after=decay)
""",
    "by_a_scheduler_at_once": """
def run(watch):
    model = net()
    scales = [0.1, 1.0]
    groups = [{"params": m.parameters(), "lr_scale": s} for m, s in zip([model[0], model[2]], scales)]
    optimizer = SGD(groups, lr=0.01)
    scheduler = lr_scheduler.LambdaLR(optimizer, [lambda t, s=s: s / (1 + t) for s in scales])
    loop(model, optimizer, watch, after=lambda i: scheduler.step())
""",
    "written_beside_the_rate": """
def run(watch):
    model = net()
    groups = [{"params": model[0].parameters(), "lr": 0.001, "lr_mult": 0.1, "name": "slow"},
              {"params": model[2].parameters(), "lr": 0.01, "lr_mult": 1.0, "name": "fast"}]
    loop(model, SGD(groups, lr=0.01), watch)
""",
    "one_cycle_keeps_its_own_keys": """
def run(watch):
    model = net()
    optimizer = SGD([{"params": model[0].parameters()}, {"params": model[2].parameters()}], lr=0.01, momentum=0.9)
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=[0.01, 0.1], total_steps=24)
    loop(model, optimizer, watch, after=lambda i: scheduler.step() if i < 23 else None)
""",
    "by_an_optimizer_of_its_own": """
class Scaled(SGD):
    def step(self, closure=None):
        key = "lr_mult"
        kept = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] *= group.get(key, 1.0)
        out = super().step(closure)
        for group, lr in zip(self.param_groups, kept):
            group["lr"] = lr
        return out


def run(watch):
    model = net()
    groups = [{"params": model[0].parameters(), "lr_mult": 0.1}, {"params": model[2].parameters()}]
    loop(model, Scaled(groups, lr=0.01), watch)
""",
    "through_a_name": """
KEYS = ("lr_scale", "wd_mult")


def run(watch):
    model = net()
    groups = [{"params": model[0].parameters(), "lr_scale": 0.1}, {"params": model[2].parameters()}]
    optimizer = SGD(groups, lr=0.01)

    def late(i):
        for group in optimizer.param_groups:
            if i == 30:
                group["lr"] *= group.get(KEYS[0], 1.0)

    loop(model, optimizer, watch, times=32, before=late)
""",
    "all_groups_alike": """
def run(watch):
    model = net()
    groups = [{"params": model[0].parameters(), "lr_mult": 1.0}, {"params": model[2].parameters(), "lr_mult": 1}]
    loop(model, SGD(groups, lr=0.01), watch)
""",
    "a_frozen_group": """
def run(watch):
    model = net()
    model[0].requires_grad_(False)
    groups = [{"params": model[0].parameters(), "lr_mult": 0.0}, {"params": model[2].parameters()}]
    loop(model, SGD(groups, lr=0.01), watch)
""",
}
_numbers = itertools.count()


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[[str], Any]]:
    """Makes a module of a program's text: which keys it reads is seen in its file."""
    made: list[str] = []

    def load(text: str) -> Any:
        name = f"program{next(_numbers)}"
        path = tmp_path / f"{name}.py"
        path.write_text(HEAD + text)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        made.append(name)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in made:
        del sys.modules[name]


def faults_of(module: Any, watched: Any) -> list[Any]:
    audits: list[Any] = []

    def watch(*args: Any) -> Any:
        inner = watched(*args)

        class Kept:
            def __enter__(self) -> Any:
                audits.append(inner.__enter__())
                return audits[0]

            def __exit__(self, *error: Any) -> Any:
                return inner.__exit__(*error)

        return Kept()

    torch.manual_seed(0)
    module.run(watch)
    return list(audits[0].faults)


@pytest.mark.parametrize("text", IGNORED.values(), ids=IGNORED)
def test_a_key_that_nobody_reads_is_named(text: str, program: Any, watched: Any) -> None:
    faults = faults_of(program(text), watched)
    assert [fault.code for fault in faults] == ["SL217"]
    assert "program" in faults[0].where  # the line that writes the key


@pytest.mark.parametrize("text", APPLIED.values(), ids=APPLIED)
def test_a_key_that_is_applied_is_not(text: str, program: Any, watched: Any) -> None:
    assert faults_of(program(text), watched) == []


def test_a_trainer_tells_before_the_first_step() -> None:
    class Run(sl.Trainer):
        def loss(self, batch: Tensor) -> Tensor:
            return self.model(batch).square().mean()

    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    groups = [{"params": model[0].parameters(), "lr_multiplier": 0.01}, {"params": model[1].parameters()}]
    trainer = Run(
        model=model,
        data=[torch.randn(8, 4)],
        optimizers=AdamW(groups, lr=0.01),
        run={"max_steps": 1},
        log={"sinks": []},
    )
    trainer.fit()
    assert [fault.code for fault in trainer.faults] == ["SL217"]
