from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from safeloop.checks.config.values import ArgumentsRefused
from safeloop.config import ConfigError, RunConfig, load, origin_text
from safeloop.config.run import RunSection
from safeloop.optim.specs import OPTIMIZERS

FULL = """\
run: {name: full, dir: out, seed: 3, max_epochs: 2, device: "cuda:1"}
trainer: {target: "safeloop.faults:Fault"}
model:
  target: "torch.nn:Sequential"
  args: [{target: "torch.nn:Linear", args: [4, 2]}, {target: "torch.nn:ReLU"}]
  inputs: [batch.0]
data:
  train: {target: "safeloop.datasets:Digits"}
  eval: {target: "safeloop.datasets:Digits", args: {split: test}}
  eval_batch_size: 7
  shuffle: false
optimizers:
  a:
    type: Adam
    lr: 1.0e-4
    betas: [0.0, 0.9]
    params: ["a.*"]
    max_norm: 1
    groups: [{params: ["*.bias"], weight_decay: 0.0}]
  b:
    type: SGD
    params: rest
    scheduler:
      type: SequentialLR
      schedulers: [{type: LinearLR, total_iters: 3}, {type: CosineAnnealingLR, T_max: 10}]
      milestones: [3]
frozen: ["stem.*"]
losses:
  declared: {weight: 0.5, trains: ["a.*"], may_be_constant: true}
  ce: {type: CrossEntropyLoss, label_smoothing: 0.1}
  own: {target: "torch.nn:L1Loss", args: {reduction: sum}, inputs: [output.0, batch.x]}
metrics: {accuracy: {target: "safeloop.metrics:Accuracy"}}
nonfinite: {policy: skip, max_consecutive: 3}
audit: {level: full, accept: {SL206: ["head.*"]}}
evaluate: {every: 5, loss: false}
log: {every: 1, grad_norms: [total], sinks: [console, {type: jsonl}]}
"""


def test_every_section_is_loaded(load_text):
    config = load_text(FULL).config
    assert config.optimizers["b"].scheduler.schedulers[1].T_max == 10
    assert config.losses["declared"].trains == ("a.*",)
    assert (config.losses["declared"].is_built, config.losses["ce"].is_built, config.losses["own"].is_built) == (
        False,
        True,
        True,
    )
    assert config.data.batch_size == 32
    assert [sink.type for sink in config.log.sinks] == ["console", "jsonl"]
    assert config.model.build(torch.nn.Module, ("torch.nn",))[0].in_features == 4


def test_the_resolved_text_is_read_back_as_the_same_config(load_text, valid):
    for text in (FULL, valid):
        first = load_text(text)
        again = load_text(first.text)
        assert again.config == first.config
        assert again.text == first.text


def test_the_resolved_text_holds_our_defaults_and_leaves_those_of_torch_to_torch(load_text, valid):
    text = load_text(valid).text
    assert "seed: 0" in text
    assert "weight_decay" not in text


def test_components_are_taken_as_sections(load_text, valid):
    sections = {"run": RunSection(max_steps=3), "optimizers": {"main": OPTIMIZERS["SGD"](lr=0.5)}}
    config = load_text(valid, sections=sections).config
    assert (config.run.max_steps, config.run.name) == (3, "digits")
    assert (config.optimizers["main"].type, config.optimizers["main"].lr) == ("SGD", 0.5)


def test_a_config_can_come_from_keywords_alone():
    sections = {"run": {"max_steps": 1}, "optimizers": {"type": "SGD", "lr": 0.1}}
    loaded = load(sections=sections, environment={}, given=["model", "data", "trainer"])
    assert (loaded.path, loaded.where("optimizers.main.lr")) == (None, "keyword optimizers")


def test_live_objects_replace_what_the_file_says(load_text, valid):
    loaded = load_text(valid.replace("torch.nn:Linear", "nowhere:X"), given=["model", "data", "optimizers", "trainer"])
    assert (loaded.config.model, loaded.config.optimizers, loaded.config.data.train) == (None, None, None)
    assert loaded.config.data.batch_size == 64


def test_a_trainer_makes_declared_losses_enough(refused, load_text, valid):
    text = valid.replace("type: CrossEntropyLoss, inputs: [output, batch.1], ", "")
    assert refused(text).fault.code == "SL117"
    assert load_text(text, given=["trainer"]).config.losses["ce"].weight == 2
    assert load_text(text + 'trainer: {target: "safeloop.faults:Fault"}\n').config.trainer is not None


def test_the_origin_of_every_value_can_be_shown(load_text, valid):
    lines = origin_text(load_text(valid, overrides=["run.seed=4"])).splitlines()
    origins = {line.split(" = ")[0]: line.split("  ")[-1].strip() for line in lines}
    assert origins["optimizers.main.lr"] == "config.yaml:9:9"
    assert origins["run.seed"] == "command line"
    assert origins["data.shuffle"] == "default"
    assert len(origins) == len(lines) > 20


def test_a_later_fault_about_a_value_is_shown_with_its_line(load_text, valid):
    error = load_text(valid).error(ArgumentsRefused, "optimizers.main.lr", "refused later", fix="change it")
    assert isinstance(error, ConfigError)
    assert error.fault.where == "config.yaml:9:9 (optimizers.main.lr)"
    assert "9 |     lr: 1e-3" in str(error)
    assert load_text(valid).error(ArgumentsRefused, "run.seed", "x").fault.where == "(run.seed)"


def test_a_broken_target_is_shown_at_its_place(refused, valid):
    text = valid.replace("torch.nn:Linear", "torch.nn:Linaer").replace("split: train", "spilt: train")
    error = refused(text)
    assert [(problem.fault.code, str(problem.at), problem.path) for problem in error.problems] == [
        ("SL111", "config.yaml:2:17", "model.target"),
        ("SL113", "config.yaml:4:54", "data.train.args.spilt"),
    ]
    assert "torch.nn:Linear" in error.fault.fix


def test_a_nested_target_is_checked_too(refused, valid):
    args = "[{target: 'os:system', args: [ls]}]"
    text = valid.replace("torch.nn:Linear", "torch.nn:Sequential").replace("{in_features: 64, out_features: 10}", args)
    error = refused(text)
    assert (error.fault.code, error.problems[0].path) == ("SL110", "model.args.0.target")


@pytest.mark.parametrize(
    ("old", "new", "path"),
    [
        ("torch.nn:Linear", "torch.optim:SGD", "model.target"),
        ("safeloop.datasets:Digits", "torch.nn:Linear", "data.train.target"),
        ("{type: CrossEntropyLoss", '{target: "torch.optim:SGD"', "losses.ce.target"),
    ],
)
def test_a_slot_refuses_a_class_of_another_kind(refused, valid, old, new, path):
    problems = {problem.path: problem.fault.code for problem in refused(valid.replace(old, new)).problems}
    assert problems[path] == "SL112"


def test_a_metric_can_be_called_or_updated(refused, valid):
    assert refused(valid + 'metrics: {a: {target: "torch.optim:SGD"}}\n').fault.code == "SL112"


def test_a_loss_with_parameters_or_a_deprecated_one_is_refused(refused, valid):
    for new in ("LinearCrossEntropyLoss, in_features: 2, num_classes: 3", "NLLLoss2d"):
        error = refused(valid.replace("CrossEntropyLoss", new))
        assert (error.fault.code, error.problems[0].path) == ("SL114", "losses.ce")


def test_nothing_that_is_light_imports_torch(tmp_path):
    code = """
import sys
from safeloop.config import load, ConfigError
from safeloop.config.schema import shipped_schema
from safeloop.target import allowed_modules
import safeloop.config.document, safeloop.config.layers, safeloop.config.sources, safeloop.checks.config.keys
assert '"AdamW"' in shipped_schema()
try:
    load("nowhere.yaml")
except ConfigError as error:
    assert error.fault.code == "SL108"
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={"PYTHONPATH": ":".join(sys.path)})


def test_the_tree_can_be_made_in_code_with_one_optimizer():
    config = RunConfig(run={"max_steps": 1}, optimizers={"type": "SGD"}, log={"sinks": ["jsonl"]})
    assert list(config.optimizers) == ["main"]
    with pytest.raises(ValueError, match="frozen"):
        config.run = RunSection()
