from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from safeloop.checks.stages import term_faults
from safeloop.checks.views import TermsView


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.ModuleDict({"online": nn.Linear(3, 1), "target": nn.Linear(3, 1)})


def view_of(model, terms, **changes):
    parameters = dict(model.named_parameters())
    view = {
        "weights": {},
        "declared": (),
        "constants_allowed": frozenset(),
        "parameters": parameters,
        "owned": frozenset(parameters),
        "trains": {},
        "source": "train.py:3 in Run.losses",
    }
    return TermsView(terms=terms, **(view | changes))


def faults_of(model, terms, **changes):
    return term_faults(view_of(model, terms, **changes))


def only(model, term, **changes):
    (fault,) = faults_of(model, {"fit": term}, **changes)
    assert fault.names == ("fit",)
    assert "loss term `fit`, train.py:3 in Run.losses" in fault.where
    assert fault.severity == "error"
    return fault


X = torch.ones(4, 3)


def test_a_differentiable_scalar_of_the_model_is_right(model):
    fit = model["online"](X).square().mean()
    assert faults_of(model, {"fit": fit, "double": fit.double(), "half": fit.bfloat16()}) == []


def test_a_tensor_with_weights_of_its_shape_is_right(model):
    each = model["online"](X)
    assert faults_of(model, {"fit": (each, torch.ones(4, 1))}) == []


def test_a_python_number_is_named_with_its_lines(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(
        "def losses(batch):\n    y = batch.mean()\n    loss = min(0, y)\n    return {'fit': loss}\n"
    )
    (fault,) = faults_of(model, {"fit": 0}, source="train.py:1 in losses")
    assert fault.code == "SL402"
    assert "loss term `fit` is the Python int 0, not a tensor" in fault.what
    assert "line 3: `loss = min(0, y)`; line 4: `return {'fit': loss}`" in fault.where
    assert "torch.clamp(y, max=0)" in fault.fix


@pytest.mark.parametrize("number", [0, 1.5, True, np.float32(2), np.float64(2), 1j], ids=repr)
def test_every_kind_of_python_number_is_one(model, number):
    assert only(model, number).code == "SL402"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "is None"),
        ([torch.ones(())], "is a list of length 1"),
        ((torch.ones(()),), "is a tuple of length 1"),
        ({"a": 1}, "is a dict of length 1"),
        (np.ones(3), "is a numpy.ndarray"),
        ("0.5", "is a str of length 3"),
    ],
    ids=["None", "list", "tuple", "dict", "array", "str"],
)
def test_what_is_no_tensor_is_described(model, value, said):
    fault = only(model, value)
    assert fault.code == "SL401"
    assert said in fault.what


def test_no_term_at_all_is_a_fault(model):
    (fault,) = faults_of(model, {})
    assert (fault.code, fault.where) == ("SL401", "train.py:3 in Run.losses")


@pytest.mark.parametrize(("shape", "said"), [((8,), "(8,)"), ((2, 2), "[2, 2]"), ((1,), "(1,)"), ((0,), "(0,)")])
def test_a_term_that_is_not_scalar_shows_its_shape_and_both_fixes(model, shape, said):
    fault = only(model, model["online"](X).mean().expand(shape))
    assert fault.code == "SL403"
    assert f"has shape {said}" in fault.what
    assert ".squeeze()" in fault.fix if shape == (1,) else ".mean()" in fault.fix and "(tensor, weights)" in fault.fix


@pytest.mark.parametrize(
    ("weights", "said"),
    [(torch.ones(4), "have shape [4]"), (torch.ones(()), "have shape []"), (0.5, "are a float"), (None, "are None")],
    ids=["shape", "scalar", "number", "nothing"],
)
def test_weights_of_another_shape_are_a_fault(model, weights, said):
    fault = only(model, (model["online"](X), weights))
    assert fault.code == "SL408"
    assert f"has shape [4, 1], its weights {said}" in fault.what


@pytest.mark.parametrize(
    "term", [torch.tensor(3), torch.tensor(True), torch.tensor(1 + 1j), torch.ones(4).long()], ids=str
)
def test_counts_comparisons_and_complex_values_are_a_fault(model, term):
    fault = only(model, term)
    assert fault.code == "SL406"
    assert str(term.dtype).removeprefix("torch.") in fault.what


def test_a_detached_term_is_a_fault_that_names_the_config_path(model):
    fault = only(model, model["online"](X).mean().detach())
    assert fault.code == "SL404"
    assert "grad mode" not in fault.what
    assert "`losses.fit.may_be_constant: true`" in fault.fix


def test_a_constant_is_right_where_it_is_declared(model):
    terms = {"fit": torch.zeros(()), "leaf": torch.zeros((), requires_grad=True)}
    assert faults_of(model, terms, constants_allowed=frozenset(terms)) == []


def test_a_term_made_with_grad_mode_off_says_so(model):
    with torch.no_grad():
        fault = only(model, model["online"](X).mean())
    assert fault.code == "SL404"
    assert "grad mode is off" in fault.what
    assert "set_grad_enabled(False)" in fault.why


@pytest.mark.parametrize("make", [lambda leaf: leaf, lambda leaf: leaf * 2 + 1], ids=["leaf", "graph"])
def test_a_new_tensor_that_requires_grad_does_not_reach_the_model(model, make):
    assert only(model, make(torch.zeros((), requires_grad=True))).code == "SL409"


def test_a_term_that_reaches_only_what_nobody_updates_is_a_fault(model):
    fault = only(model, model["target"](X).mean(), owned=frozenset({"online.weight", "online.bias"}))
    assert fault.code == "SL409"
    assert "`target.weight`, `target.bias`, which no optimizer updates" in fault.what


def test_a_parameter_returned_as_a_term_reaches_itself(model):
    model.scale = nn.Parameter(torch.ones(()))
    assert faults_of(model, {"fit": model.scale}) == []


def test_a_term_that_reaches_another_parameter_than_declared_is_a_fault(model):
    term = (model["online"](X) - model["target"](X)).square().mean()
    (fault,) = faults_of(model, {"td": term}, trains={"td": ["online.*"]})
    assert (fault.code, fault.names) == ("SL410", ("target.weight", "target.bias"))
    assert "declared to train `online.*` and also reaches `target.weight`, `target.bias`" in fault.what
    assert "`losses.td.trains`" in fault.fix


def test_a_term_of_the_wrong_shape_is_told_that_first(model):
    assert only(model, model["online"](X), trains={"fit": ["target.*"]}).code == "SL403"


def test_a_detached_target_is_right(model):
    term = (model["online"](X) - model["target"](X).detach()).square().mean()
    assert faults_of(model, {"td": term}, trains={"td": ["online.*"]}) == []


def test_a_frozen_target_is_right(model):
    model["target"].requires_grad_(False)
    term = (model["online"](X) - model["target"](X)).square().mean()
    assert faults_of(model, {"td": term}, trains={"td": ["online.*"]}) == []


@pytest.mark.parametrize(
    ("pattern", "is_frozen", "said"),
    [
        ("target.*", False, "but reaches none of `target.weight`, `target.bias`"),
        ("target.*", True, "but `target.weight`, `target.bias` do not require grad: frozen"),
        ("targt.*", False, "matches no parameter"),
    ],
)
def test_a_pattern_that_is_not_reached_says_why(model, pattern, is_frozen, said):
    model["target"].requires_grad_(not is_frozen)
    (fault,) = faults_of(model, {"td": model["online"](X).mean()}, trains={"td": ["online.*", pattern]})
    assert fault.code == "SL410"
    assert said in fault.what


def test_a_tied_parameter_is_named_by_any_of_its_names(model):
    parameters = dict(model.named_parameters()) | {"alias": model["online"].weight}
    term = nn.functional.linear(X, model["online"].weight).mean()
    assert faults_of(model, {"fit": term}, parameters=parameters, trains={"fit": ["alias"]}) == []


def test_what_a_reentrant_checkpoint_hides_is_not_missed(model):
    x = X.clone().requires_grad_()
    term = checkpoint(model["online"], x, use_reentrant=True).mean()
    assert faults_of(model, {"fit": term}, trains={"fit": ["online.*"]}) == []


def test_a_declared_term_that_is_missing_suggests_the_nearest_name(model):
    fit = model["online"](X).mean()
    (fault,) = faults_of(model, {"recon": fit, "other": fit}, declared=("reconn", "other"))
    assert (fault.code, fault.names) == ("SL407", ("reconn",))
    assert "the nearest name is `recon`" in fault.what
    assert "returned: `recon`, `other`" in fault.where


def test_a_missing_term_is_enough_to_say_where_none_came(model):
    (fault,) = faults_of(model, {}, declared=("fit",))
    assert fault.code == "SL407"


def test_a_declared_term_is_not_suggested_for_another(model):
    fit = model["online"](X).mean()
    (fault,) = faults_of(model, {"fit1": fit}, declared=("fit1", "fit2"))
    assert "nearest" not in fault.what


def test_a_term_that_may_be_constant_may_stay_away(model):
    fit = model["online"](X).mean()
    assert faults_of(model, {"a": fit}, declared=("a", "b"), constants_allowed=frozenset({"b"})) == []


def test_a_misspelled_name_is_told_before_what_is_wrong_with_a_value(model):
    faults = faults_of(model, {"a": 3, "b": torch.ones(3), "c": torch.ones(()), "d": None}, declared=("e",))
    assert [fault.code for fault in faults] == ["SL407", "SL402", "SL401", "SL403", "SL404", "SL404"]
