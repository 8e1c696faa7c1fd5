from __future__ import annotations

from collections import namedtuple

import pytest
import torch

from safeloop.config.inputs import follow
from safeloop.faults import FaultError

Pair = namedtuple("Pair", ["left", "right"])


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("batch", {"x": [1, 2], 3: "three"}),
        ("batch.x.1", 2),
        ("batch.3", "three"),
        ("output.0", "l"),
        ("output.right", "r"),
    ],
)
def test_a_path_is_followed_through_keys_indices_and_attributes(path, found):
    assert follow(path, {"batch": {"x": [1, 2], 3: "three"}, "output": Pair("l", "r")}) == found


@pytest.mark.parametrize(
    ("path", "what", "fix"),
    [
        ("batch.labls", "batch has no 'labls'", "did you mean batch.labels?"),
        ("batch.images.0", "it is a Tensor", "correct the path"),
        ("output.2", "output has no '2'", "output has 0, 1"),
        ("output.__class__", "no '__class__'", ""),
    ],
)
def test_a_path_that_leads_nowhere_names_what_is_there(path, what, fix):
    roots = {"batch": {"images": torch.zeros(2), "labels": torch.zeros(2)}, "output": (1, 2)}
    with pytest.raises(FaultError) as caught:
        follow(path, roots, where="a.yaml:1:1")
    fault = caught.value.fault
    assert (fault.code, fault.where) == ("SL119", "a.yaml:1:1")
    assert what in fault.what
    assert fix in fault.fix


@pytest.mark.parametrize(
    "path", ["outputs", "batch.", "", "batch..1", "batch.a b", "batch.-1", "output.1.5e", "loss.ce"]
)
def test_a_path_of_another_form_is_refused_when_loaded(refused, valid, path):
    error = refused(valid.replace("[output, batch.1]", f"[{path!r}, batch.1]"))
    assert (error.fault.code, error.problems[0].path) == ("SL119", "losses.ce.inputs.0")


def test_a_model_cannot_read_its_own_output(refused, valid):
    error = refused(valid.replace("out_features: 10}", "out_features: 10}, inputs: [output]"))
    assert (error.fault.code, error.problems[0].path) == ("SL119", "model.inputs.0")
