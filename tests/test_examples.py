"""What ships is run: every config, every example, and what the two digit runs leave behind."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import safeloop as sl
from safeloop.config import load
from safeloop.datasets import Digits
from safeloop.trainer import trainer_class

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
EXAMPLES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "examples").glob("[!_]*.py"))}
PROGRAMS = [name for name, text in EXAMPLES.items() if '__name__ == "__main__"' in text]


@pytest.fixture(autouse=True)
def _at_the_top(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(config: str, *overrides: str) -> sl.RunResult:
    loaded = load(Path("configs", config), overrides=["run.device=cpu", *overrides])
    return trainer_class(loaded)(loaded).fit()


def scalars(folder: Path) -> dict[str, list[float]]:
    """Tag -> its values, in the order of the steps."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_loads_without_a_warning_and_names_the_schema(name: str) -> None:
    path = Path("configs", name)
    assert not load(path, environment={}).warnings
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == "# yaml-language-server: $schema=../safeloop/schema/safeloop.schema.json"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_trains_and_leaves_nothing_behind_without_sinks(name: str, tmp_path: Path) -> None:
    result = train(name, "run.max_steps=3", f"run.dir={tmp_path}", "log.sinks=[]")
    assert (result.steps, result.faults, result.dir) == (3, (), None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in PROGRAMS])
def test_an_example_that_is_no_program_is_trained_by_a_config(name: str) -> None:
    texts = [Path("configs", config).read_text(encoding="utf-8") for config in CONFIGS]
    assert any(f'trainer: {{target: "examples.{name}:' in text for text in texts)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_example_runs_as_a_program(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[sl.RunResult] = []
    make, fit = sl.Trainer.__init__, sl.Trainer.fit

    def make_short(self: sl.Trainer, config: Any = None, **given: Any) -> None:
        run = {**given.pop("run", {}), "max_steps": 3, "device": "cpu"}
        make(self, config, **{**given, "run": run, "log": {"sinks": []}})

    def fit_and_keep(self: sl.Trainer) -> sl.RunResult:
        results.append(fit(self))
        return results[-1]

    monkeypatch.setattr(sl.Trainer, "__init__", make_short)
    monkeypatch.setattr(sl.Trainer, "fit", fit_and_keep)
    runpy.run_path(f"examples/{name}.py", run_name="__main__")
    assert [(result.steps, result.faults) for result in results] == [(3, ())]
    assert results[0].metrics


def test_digits_learns_and_its_event_file_holds_what_a_reader_looks_for(tmp_path: Path) -> None:
    result = train("digits.yaml", "run.max_steps=300", f"run.dir={tmp_path}", "log.sinks=[tensorboard]")
    assert result.metrics["accuracy"] >= 0.95
    assert result.dir == tmp_path / "digits"
    found = scalars(result.dir)
    before, after = found["grad/main/pre_clip"], found["grad/main/post_clip"]
    assert len(before) == len(after) == 30
    assert max(before) > 1.0
    assert max(after) <= 1.0 + 1e-6
    assert [min(norm, 1.0) for norm in before] == pytest.approx(after, rel=1e-5)
    modules = {tag for tag in found if tag.startswith("module/grad_norm/")}
    children = ("encoder.0", "encoder.1", "encoder.3", "encoder.6", "classifier.1", "decoder")
    assert modules == {f"module/grad_norm/{name}" for name in children}
    squares = [sum(found[tag][i] ** 2 for tag in modules) ** 0.5 for i in range(30)]
    assert squares == pytest.approx(before, rel=1e-4)
    weighted = [c + 0.5 * r for c, r in zip(found["loss/classify"], found["loss/reconstruct"], strict=True)]
    assert found["loss/train"] == pytest.approx(weighted, rel=1e-5)
    assert found["metric/accuracy"][-1] == pytest.approx(result.metrics["accuracy"])
    assert len(found["metric/accuracy"]) == 3


def test_digits_without_python_learns_too(tmp_path: Path) -> None:
    result = train("digits_config_only.yaml", "run.max_steps=300", f"run.dir={tmp_path}", "log.sinks=[tensorboard]")
    assert result.metrics["accuracy"] >= 0.95
    assert result.dir is not None
    found = scalars(result.dir)
    assert found["loss/ce"] == found["loss/train"]
    assert {"grad/main/pre_clip", "grad/main/post_clip", "module/grad_norm/0", "module/grad_norm/3"} <= found.keys()


def test_wgan_gp_draws_every_digit_within_three_hundred_steps() -> None:
    changes = ["run.device=cpu", "run.max_steps=300", "log.sinks=[]"]
    loaded = load(Path("configs/wgan_gp.yaml"), overrides=changes)
    run = trainer_class(loaded)(loaded)
    result = run.fit()
    assert result.faults == ()
    assert result.metrics["digits/found"] == 10
    assert result.metrics["digits/rarest"] >= 0.02
    assert abs(result.losses["gp"]) < 0.1, "the slope stays near 1"
    images = run.model.generator(torch.randn(360, 16)).detach()
    real, held_out = (Digits(split, flat=True).tensors[0] for split in ("train", "test"))
    near, wanted = (torch.cdist(some, real).min(1).values.mean() for some in (images, held_out))
    assert near < 1.8 * wanted, "a generated digit looks as much like a real one as another real digit does, nearly"
    assert torch.cdist(torch.rand(360, 64), real).min(1).values.mean() > 2 * near
