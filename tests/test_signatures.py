from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Literal, get_args

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch.optim import lr_scheduler

from safeloop.signatures import Refusal, arguments, family, refusal


class Scheduler:
    pass


class Kinds:
    def __init__(
        self,
        params,
        number: float,
        either: float | torch.Tensor = 1.0,
        steps: int = 3,
        pair: tuple[float, float | torch.Tensor] = (0.1, 0.2),
        many: Iterable[int] = (),
        maybe: bool | None = None,
        mode: Literal["a", "b"] = "a",
        tensor: torch.Tensor | None = None,
        function: Callable[[int], int] | None = None,
        size_average=None,
        lr: float = 0.1,
        inner: list[Scheduler] | None = None,
        *,
        differentiable: bool = False,
        **others: int,
    ):
        pass


class NeedsAFunction:
    def __init__(self, function: Callable[[int], int]):
        pass


def accepts(argument, value):
    try:
        TypeAdapter(argument.annotation).validate_python(value)
    except ValidationError:
        return False
    return True


def test_what_yaml_cannot_write_is_left_out_and_the_rest_is_kept_in_order():
    found = arguments(Kinds)
    assert list(found) == ["number", "either", "steps", "pair", "many", "maybe", "mode", "lr"]
    assert found["number"].default is ...
    assert found["pair"].default == (0.1, 0.2)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("number", [1, 1.5, -2], [True, "1", None, [1]]),
        ("either", [1.5], [True, "1", None]),
        ("steps", [3], [3.0, "3", True, None]),
        ("pair", [[1, 2]], [[1], [1, 2, 3], ["1", 2], 1, [True, 1]]),
        ("many", [[], [1, 2]], [[1.5], 1, ["1"]]),
        ("maybe", [True, None], [1, "true"]),
        ("mode", ["a"], ["c", 1]),
        ("lr", [0, 1], [-1]),
    ],
)
def test_types_are_strict(name, good, bad):
    argument = arguments(Kinds)[name]
    assert all(accepts(argument, value) for value in good)
    assert not any(accepts(argument, value) for value in bad)


def test_a_required_argument_that_cannot_be_written_rules_the_class_out():
    assert arguments(NeedsAFunction) is None
    assert arguments(lr_scheduler.LambdaLR) is None


def test_an_annotation_can_be_given_a_meaning():
    found = arguments(Kinds, {Scheduler: int})
    assert accepts(found["inner"], [1, 2])
    assert not accepts(found["inner"], [{}])


def test_every_argument_of_every_torch_optimizer_is_read_with_its_default():
    left_out = {"self", "params", "differentiable"}
    for cls in family(torch.optim, torch.optim.Optimizer).values():
        parameters = inspect.signature(cls.__init__).parameters
        found = arguments(cls)
        assert set(found) == set(parameters) - left_out
        assert all(found[name].default == parameters[name].default for name in found)


def test_the_words_of_an_argument_are_those_that_torch_checks():
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    for word in get_args(get_args(arguments(torch.optim.Muon)["adjust_lr_fn"].annotation)[0]):
        torch.optim.Muon([parameter], adjust_lr_fn=word)
    with pytest.raises(ValueError, match="not supported"):
        torch.optim.Muon([parameter], adjust_lr_fn="other")


def construct(given):
    if given.get("a") == 1:
        raise ValueError("a must not be 1")
    if {"b", "c"} <= given.keys():
        raise RuntimeError("b and c exclude each other")
    if "d" in given:
        raise TypeError


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"a": 2, "b": 1}, None),
        ({"a": 1, "b": 1}, Refusal(("a",), "a must not be 1")),
        ({"b": 1, "c": 1}, Refusal(("c",), "b and c exclude each other")),
        ({"a": 1, "b": 1, "c": 1}, Refusal((), "a must not be 1")),
        ({"d": 1}, Refusal(("d",), "TypeError")),
    ],
)
def test_the_argument_without_which_it_would_work_is_blamed(given, found):
    assert refusal(construct, given) == found
