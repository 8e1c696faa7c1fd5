"""The `losses` section: weights and promises of loss terms, and torch's losses for runs without Python code."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

from pydantic import Discriminator, Field, Tag, create_model
from torch import nn
from torch.nn.modules import loss as torch_losses

from safeloop.component import Bool, Component, Float, Int
from safeloop.config.inputs import InputPath
from safeloop.optim.specs import Patterns
from safeloop.signatures import Refusal, arguments, family, refusal
from safeloop.target import TargetSpec
from safeloop.weights import WeightRamp

INPUTS: tuple[str, ...] = ("output", "batch.1")


class LossSection(Component):
    """What a config says of one loss term. A term that the config does not name has these defaults."""

    weight: Float | WeightRamp = Field(default=1.0, json_schema_extra={"x-from": "safeloop"})
    """factor of this term in the sum that is differentiated: a number, or a line from `start` to `end` over `steps`"""
    every: Int = Field(default=1, ge=1, json_schema_extra={"x-from": "safeloop"})
    """the term counts only on the steps that this divides; a callable term is not even computed on the others"""
    trains: Patterns | None = Field(default=None, json_schema_extra={"x-from": "safeloop"})
    """patterns of the parameters that this term may reach; reaching another one, or none, is a fault"""
    may_be_constant: Bool = Field(default=False, json_schema_extra={"x-from": "safeloop"})
    """whether the term may be a constant on some batches; it is then skipped and counted"""

    @property
    def is_built(self) -> bool:
        """Whether the config itself says how the term is computed."""
        return False

    @property
    def first_weight(self) -> float:
        """The weight on the first step."""
        return self.weight.at(0) if isinstance(self.weight, WeightRamp) else self.weight

    def build(self, allow: Collection[str]) -> Callable[..., Any] | None:
        """The loss as a callable of its inputs; None where a Trainer computes the term."""
        return None


class TargetLoss(LossSection):
    """A loss given by the user's own class, for runs without a Trainer subclass."""

    target: str
    """`package.module:Class`, whose objects are called with the inputs"""
    args: dict[str, Any] | list[Any] = Field(default_factory=dict)
    """arguments by name, or a list of them in order"""
    inputs: tuple[InputPath, ...] = Field(default=INPUTS, min_length=1)
    """paths into the batch and the model's output, in the order of the call"""

    @property
    def is_built(self) -> bool:
        return True

    def build(self, allow: Collection[str]) -> Callable[..., Any]:
        made: Callable[..., Any] = TargetSpec(target=self.target, args=self.args).build(Callable, allow)  # type: ignore[arg-type]
        return made


class TorchLoss(LossSection):
    """A loss of torch by its class name, for runs without a Trainer subclass."""

    keeps_foreign_defaults: ClassVar[bool] = True
    torch_class: ClassVar[type[nn.Module]]

    type: str
    inputs: tuple[InputPath, ...] = Field(default=INPUTS, min_length=1, json_schema_extra={"x-from": "safeloop"})
    """paths into the batch and the model's output, in the order of the call"""

    @property
    def is_built(self) -> bool:
        return True

    def arguments(self) -> dict[str, Any]:
        """The arguments of torch that were written; torch's defaults stay torch's."""
        return {name: getattr(self, name) for name in sorted(self.model_fields_set - TorchLoss.model_fields.keys())}

    def build(self, allow: Collection[str] = ()) -> nn.Module:
        return self.torch_class(**self.arguments())


def _model(name: str, cls: type[nn.Module]) -> type[TorchLoss]:
    found = arguments(cls) or {}
    fields: dict[str, Any] = {"type": (Literal[name], ...)}
    fields |= {argument: one.field() for argument, one in found.items() if argument != "weight"}
    if "reduction" in fields and name == "KLDivLoss":
        fields["reduction"] = (Literal["mean", "sum", "batchmean"], fields["reduction"][1])
    model = create_model(f"{name}Section", __base__=TorchLoss, __module__=__name__, **fields)
    model.__doc__ = f"torch.nn.{name}"
    model.torch_class = cls
    return model


LOSSES: dict[str, type[TorchLoss]] = {
    name: _model(name, cls) for name, cls in family(torch_losses, torch_losses._Loss).items()
}
"""type -> its model. Class weights and other tensors cannot be written in YAML; use a target for them."""


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value["type"]) if "type" in value else "target" if "target" in value else "declared"
    return "target" if isinstance(value, TargetLoss) else getattr(value, "type", "declared")


if TYPE_CHECKING:
    AnyLoss = LossSection
else:
    _KINDS = {"declared": LossSection, "target": TargetLoss, **LOSSES}
    AnyLoss = Annotated[
        Union[tuple(Annotated[model, Tag(name)] for name, model in _KINDS.items())],  # noqa: UP007
        Discriminator(_kind),
    ]


def dry_construct_loss(section: TorchLoss) -> Refusal | None:
    """Build a loss of torch; what torch refuses or deprecates, or None.

    A loss with parameters of its own is refused: no optimizer would own them.
    """

    def construct(chosen: dict[str, Any]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            built = section.torch_class(**chosen)
        if names := [name for name, _ in built.named_parameters()]:
            raise ValueError(f"{section.type} has parameters of its own ({', '.join(names)}); put it into the model")

    return refusal(construct, section.arguments())
