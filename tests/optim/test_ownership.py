"""Who owns which parameter: patterns, rest, frozen, tied, duplicated, foreign."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from safeloop.optim.ownership import owned_by_identity, owned_by_patterns


def make_model() -> nn.Module:
    return nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)})


def test_star_crosses_dots_and_rest_takes_what_no_other_pattern_took() -> None:
    ownership = owned_by_patterns(make_model(), {"a": ["*.bias"], "b": "rest"})
    assert ownership.owner_of == {"body.weight": "b", "body.bias": "a", "head.weight": "b", "head.bias": "a"}
    assert not ownership.unowned


def test_what_no_pattern_takes_is_unowned_and_what_two_take_is_duplicated() -> None:
    ownership = owned_by_patterns(make_model(), {"a": ["body.*"], "b": ["*.bias"]})
    assert ownership.unowned == ("head.weight",)
    assert ownership.duplicated == {"body.bias": ("a", "b")}


def test_declared_and_born_frozen_parameters_have_no_owner() -> None:
    model = make_model()
    model["head"].bias.requires_grad_(False)
    ownership = owned_by_patterns(model, {"a": ["*"]}, frozen=["body.*"])
    assert set(ownership.frozen) == {"body.weight", "body.bias", "head.bias"}
    assert ownership.owner_of == {"head.weight": "a"}


def test_a_pattern_that_matches_nothing_is_listed_with_its_path() -> None:
    ownership = owned_by_patterns(make_model(), {"a": ["*", "tail.*"]}, frozen=["nose.*"])
    assert ownership.unmatched == {"optimizers.a.params": ("tail.*",), "frozen": ("nose.*",)}


def test_a_tied_parameter_is_matched_by_any_of_its_names_and_owned_once() -> None:
    model = make_model()
    model["head"].weight = model["body"].weight
    ownership = owned_by_patterns(model, {"a": ["head.*"], "b": "rest"})
    assert ownership.owner_of == {"body.weight": "a", "body.bias": "b", "head.bias": "a"}
    assert ownership.tied == {"body.weight": ("head.weight",)}
    assert owned_by_patterns(model, {"a": ["*"]}, frozen=["head.weight"]).frozen == ("body.weight",)


def test_an_optimizer_that_takes_nothing_is_empty() -> None:
    ownership = owned_by_patterns(make_model(), {"a": ["*"], "b": "rest"})
    assert ownership.empty == ("b",)


def test_ready_optimizers_own_by_identity_and_strangers_are_foreign() -> None:
    model = make_model()
    stranger = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.SGD([*model["body"].parameters(), stranger], lr=0.1)
    ownership = owned_by_identity(model, {"main": optimizer})
    assert set(ownership.owner_of) == {"body.weight", "body.bias"}
    assert set(ownership.unowned) == {"head.weight", "head.bias"}
    assert ownership.foreign["main"][0] is stranger


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_every_parameter_is_owned_unowned_or_frozen_and_only_one_of_these(data: st.DataObject) -> None:
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(3)])
    names = [name for name, _ in model.named_parameters()]
    patterns = st.lists(st.sampled_from([*names, "*", "*.bias", "0.*", "[12].weight"]), max_size=3)
    owners = {name: data.draw(patterns) for name in ("a", "b")}
    frozen = data.draw(patterns)
    ownership = owned_by_patterns(model, {**owners, "c": "rest"} if data.draw(st.booleans()) else owners, frozen)
    places = [*ownership.owner_of, *ownership.unowned, *ownership.frozen]
    assert sorted(places) == sorted(names)
