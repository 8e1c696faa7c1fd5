"""The examples on every page: the bad one ends in exactly that code, the good one in no fault."""

from __future__ import annotations

import ast

import pytest

import safeloop as sl
from safeloop.audit import Audit
from safeloop.checks.explain import Example, page
from safeloop.checks.registry import FILES
from safeloop.config import Loaded, load
from safeloop.faults import Fault, FaultError

PRELUDE = """
import torch
from torch import nn
import torch.nn.functional as F
import safeloop as sl

torch.manual_seed(0)
"""


def faults_of_python(text: str, path) -> list[Fault]:
    """Run an example; its faults are those raised, else those of every run that it leaves behind."""
    path.write_text(text, encoding="utf-8")
    tree = ast.parse(text, str(path))
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    namespace: dict[str, object] = {"__name__": "example"}
    exec(PRELUDE, namespace)
    try:
        exec(compile(tree, str(path), "exec"), namespace)
        if last is not None:
            namespace["_last"] = eval(compile(last, str(path), "eval"), namespace)
    except FaultError as error:
        return [error.fault]
    holders = [value for value in namespace.values() if isinstance(value, sl.Trainer | sl.RunResult | Loaded | Audit)]
    found = [
        fault for holder in holders for fault in (holder.warnings if isinstance(holder, Loaded) else holder.faults)
    ]
    return list(dict.fromkeys(found))


def faults_of_yaml(text: str, path) -> list[Fault]:
    """Load an example as a config file."""
    path.write_text(text, encoding="utf-8")
    try:
        return list(load(path, environment={}).warnings)
    except FaultError as error:
        return [error.fault]


def faults_of(example: Example, folder) -> list[Fault]:
    if example.language == "yaml":
        return faults_of_yaml(example.text, folder / "config.yaml")
    return faults_of_python(example.text, folder / "example.py")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of SL315, which says more
@pytest.mark.parametrize("code", FILES)
def test_the_bad_example_ends_in_its_code(code, folder):
    faults = faults_of(page(code).bad, folder)
    assert [fault.code for fault in faults] == [code], "\n\n".join(map(str, faults))
    assert faults[0].severity == page(code).severity


@pytest.mark.parametrize("code", FILES)
def test_the_good_example_ends_in_no_fault(code, folder):
    faults = faults_of(page(code).good, folder)
    assert faults == [], "\n\n".join(map(str, faults))
