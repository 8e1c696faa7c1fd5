from __future__ import annotations

import pytest
from pydantic import ValidationError

from safeloop.data.config import DataConfig


def test_an_empty_section_has_the_documented_defaults():
    config = DataConfig()
    assert config.model_dump() == {
        "train": None,
        "eval": None,
        "batch_size": 32,
        "eval_batch_size": None,
        "shuffle": True,
        "drop_last": False,
        "num_workers": 0,
    }


def test_targets_are_taken():
    assert DataConfig.model_validate({"train": {"target": "safeloop.datasets:Digits"}}).train is not None


@pytest.mark.parametrize(
    "section",
    [
        {"batch_size": 0},
        {"batch_size": -4},
        {"batch_size": 2.0},
        {"batch_size": "8"},
        {"batch_size": True},
        {"eval_batch_size": 0},
        {"num_workers": -1},
        {"shuffle": "yes"},
        {"shuffle": 1},
        {"workers": 2},
    ],
    ids=str,
)
def test_a_wrong_value_is_refused(section):
    with pytest.raises(ValidationError):
        DataConfig.model_validate(section)


def test_every_field_says_what_it_means():
    assert all(field.description for field in DataConfig.model_fields.values())
