"""Runs without a line of Python: the model's inputs, losses and metrics are paths and classes that the config names."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from safeloop.checks.config.run import BadInputPath
from safeloop.config.inputs import follow
from safeloop.penalised import DeclaredPenalties

if TYPE_CHECKING:
    from safeloop.config import Loaded


class Declared:
    """Functions of a batch that the config declares by name: losses, or metrics.

    Args:
        loaded: the config, which also says where each path stands.
        model: gives the model, which is called once for each batch.
        functions: name -> what is called with the inputs.
        inputs: name -> paths into the batch and the model's output.
        section: `losses` or `metrics`.
        penalties: what is made of gradients of the losses or of the output.
    """

    def __init__(
        self,
        loaded: Loaded,
        model: Callable[[], nn.Module],
        functions: Mapping[str, Callable[..., Any]],
        inputs: Mapping[str, Sequence[str]],
        section: str,
        penalties: DeclaredPenalties,
    ) -> None:
        self.functions = functions
        self.penalties = penalties
        self._inputs = inputs
        self._model = model
        self._model_inputs = loaded.config.model.inputs if loaded.config.model is not None else None
        self._where = {name: loaded.where(f"{section}.{name}.inputs") for name in functions}
        self._model_where = loaded.where("model.inputs")

    def only(self, names: Sequence[str]) -> Declared:
        """The same, of some of the functions and penalties."""
        chosen = copy.copy(self)
        chosen.functions = {name: self.functions[name] for name in names if name in self.functions}
        chosen.penalties = self.penalties.only(names)
        return chosen

    def __call__(self, batch: Any) -> dict[str, Any]:
        """Run the model on a batch, and every function on what its paths lead to."""
        batch = self.penalties.with_leaves(batch)
        roots = {"batch": batch, "output": self._model()(*self._model_arguments(batch))}
        computed = {
            name: _called(function, [follow(path, roots, where=self._where[name]) for path in self._inputs[name]])
            for name, function in self.functions.items()
        }
        return {**computed, **self.penalties.requests(batch, roots["output"], computed)}

    def _model_arguments(self, batch: Any) -> list[Any]:
        if self._model_inputs is not None:
            return [follow(path, {"batch": batch}, where=self._model_where) for path in self._model_inputs]
        if isinstance(batch, Tensor):
            return [batch]
        if isinstance(batch, Sequence) and batch:
            return [batch[0]]
        raise BadInputPath.error(
            f"the batch is a {type(batch).__name__}: nothing says which part of it the model is called with",
            where="model.inputs",
            fix="set `model.inputs`, for example `inputs: [batch.image]`",
        )


def declared_losses(
    loaded: Loaded, model: Callable[[], nn.Module], device: torch.device, leaf: Callable[[Tensor], Tensor]
) -> Declared:
    """The loss terms of a config-only run; `leaf` makes one of a tensor on the steps when a penalty is due."""
    sections = {name: section for name, section in loaded.config.losses.items() if section.is_built}
    functions = {name: section.build(loaded.allow) for name, section in sections.items()}
    penalties = DeclaredPenalties(loaded, loaded.config.penalties, leaf)
    return Declared(loaded, model, _on(device, functions), _paths(sections), "losses", penalties)


def declared_metrics(loaded: Loaded, model: Callable[[], nn.Module], device: torch.device) -> Declared:
    """The metrics of a config-only run."""
    sections = loaded.config.metrics
    functions = {name: section.build(object, loaded.allow) for name, section in sections.items()}
    return Declared(
        loaded, model, _on(device, functions), _paths(sections), "metrics", DeclaredPenalties(loaded, {}, lambda x: x)
    )


def _paths(sections: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    return {name: section.inputs for name, section in sections.items()}


def _on(device: torch.device, functions: Mapping[str, Any]) -> dict[str, Any]:
    return {name: f.to(device) if isinstance(f, nn.Module) else f for name, f in functions.items()}


def _called(function: Any, arguments: list[Any]) -> Any:
    """What a function gives; an object with `update`, `compute` and `reset` is updated and returned itself."""
    if all(hasattr(function, name) for name in ("update", "compute", "reset")):
        function.update(*arguments)
        return function
    return function(*arguments)
