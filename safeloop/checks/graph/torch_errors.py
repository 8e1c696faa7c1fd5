"""Torch's own errors about graphs, told with the user's line, the parameter and the fix."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from safeloop.checks.check import Check
from safeloop.checks.graph.derivatives import (
    GradientOfNonScalar,
    InferenceTensor,
    NoSecondDerivative,
    TensorWithoutGraph,
)
from safeloop.checks.graph.saved import SavedTensorChanged
from safeloop.checks.graph.scene import Scene, scene_of
from safeloop.checks.setup.scan import buffer_attributes, tensor_attributes
from safeloop.faults import Fault


class LeafChangedInPlace(Check):
    """A leaf tensor that requires grad was changed in place while grad mode is on.

    ## What it does
    Recognises torch's error "a leaf Variable that requires grad is being used in an in-place operation", and names
    the line and, where it is one, the parameter.

    ## Why it is bad
    A leaf is what gradients are stored for. After a recorded write its value would be the result of an operation, so
    torch refuses. Two cases are common: a loss summed up in `torch.tensor(0.0, requires_grad=True)`, and a mask or a
    constraint applied to a weight inside `forward`.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            total = torch.tensor(0.0, requires_grad=True)
            for row in batch:
                total += self.model(row).square().mean()
            return total

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            terms = [self.model(row).square().mean() for row in batch]
            return sum(terms)

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 1), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Sum by `sum(terms)`, or start from a plain `0`. Use a weight changed out of place:
    `F.linear(x, self.weight * self.mask)`. To change the stored value itself, do it under `with torch.no_grad():`,
    before the forward.

    ## Source
    Documentation of `torch.Tensor.is_leaf`; "In-place operations with autograd" in torch's autograd notes.
    """

    code = "SL301"
    title = "leaf tensor changed in place"

    @classmethod
    def of(cls, scene: Scene) -> Fault:
        """The fault for an error raised on the line that writes."""
        leaves = {expr: t for expr, t in scene.tensors().items() if t.is_leaf and t.requires_grad}
        parameters = {expr: name for expr, t in leaves.items() if (name := scene.parameter_name(t))}
        shown = [f"`{expr}`" + (f" (parameter `{parameters[expr]}`)" if expr in parameters else "") for expr in leaves]
        return cls.fault(
            f"{', '.join(shown) or 'a tensor'} is a leaf that requires grad, or a view of one, and is changed in place",
            where=scene.where,
            why="gradients are stored for leaves; after a recorded write this one would be the result of an operation",
            fix="use it changed out of place (`self.weight * self.mask`), or write under `with torch.no_grad():` "
            "before the forward"
            if parameters
            else "collect terms in a list and return `sum(terms)`, or start the sum from a plain 0",
            names=tuple(parameters.values()),
        )


class GraphUsedTwice(Check):
    """A backward pass reached a part of a graph that an earlier one has freed.

    ## What it does
    Recognises torch's error "Trying to backward through the graph a second time", and lists the model's attributes
    that still hold a graph.

    ## Why it is bad
    Something of an earlier step is used again: a hidden state kept for the next batch without `detach()`, a value
    computed once in `__init__`, or a loss that was already differentiated inside the loss function.
    `retain_graph=True` is no cure: the weights have changed since, so the gradient would be wrong, and memory grows
    with every step.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            loss = self.model(batch).square().mean()
            torch.autograd.grad(loss, self.model.weight)
            return loss

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 4), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            loss = self.model(batch).square().mean()
            torch.autograd.grad(loss, self.model.weight, retain_graph=True)
            return loss

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 4), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Detach what is kept for the next batch: `self.state = state.detach()`. Compute in `forward` what depends on a
    parameter. Never call `backward()` in a loss function; return the terms.

    ## Source
    https://github.com/MorvanZhou/PyTorch-Tutorial/issues/57; https://github.com/Eurus-Holmes/MNMT/issues/7.
    """

    code = "SL302"
    title = "graph used a second time"

    @classmethod
    def of(cls, scene: Scene) -> Fault:
        """The fault for an error raised by a backward pass."""
        kept = [
            a
            for scan in (tensor_attributes, buffer_attributes)
            for a in scan(scene.model)
            if a.tensor.grad_fn is not None
        ]
        held = f"a tensor with a graph is kept in {', '.join(map(str, kept[:6]))}"
        first = f": `self.{kept[0].attribute} = {kept[0].attribute}.detach()`" if kept else ", outside the model too"
        return cls.fault(
            "the backward pass reached a part of a graph that an earlier one has freed; "
            + (held if kept else "no attribute of the model keeps a graph"),
            where=scene.where,
            why="likely, in this order: a tensor of an earlier step is used again without `detach()` (a state "
            "carried from batch to batch); a value computed once, before the first step; a `backward()` inside the "
            "loss function",
            fix=f"detach what is kept from batch to batch{first}; retain_graph=True does not help, since the weights "
            "have changed",
            names=tuple(a.path for a in kept),
        )


def translate(error: RuntimeError, *, terms_source: str, model: nn.Module) -> Fault | None:
    """The fault that explains one of torch's own errors, raised by a loss function or by backward; None for others.

    Args:
        error: as it was caught, with its traceback.
        terms_source: where the loss function is defined.
        model: searched for the names of parameters, modules and attributes.
    """
    message = str(error)
    for part, explain in _KNOWN:
        if part in message:
            return explain(scene_of(error, terms_source, model))
    return None


_KNOWN: tuple[tuple[str, Callable[[Scene], Fault]], ...] = (
    ("a leaf Variable that requires grad is being used in an in-place operation", LeafChangedInPlace.of),
    ("a leaf Variable that requires grad has been used in an in-place operation", LeafChangedInPlace.of),
    ("Trying to backward through the graph a second time", GraphUsedTwice.of),
    ("has been modified by an inplace operation", SavedTensorChanged.of),
    ("Inference tensors cannot be saved for backward", InferenceTensor.of),
    ("inference tensor outside InferenceMode is not allowed", InferenceTensor.of),
    ("marked with @once_differentiable", NoSecondDerivative.of),
    ("does not require grad and does not have a grad_fn", TensorWithoutGraph.of),
    ("One of the differentiated Tensors does not require grad", TensorWithoutGraph.of),
    ("can't retain_grad on Tensor that has requires_grad=False", TensorWithoutGraph.of),
    ("grad can be implicitly created only for scalar outputs", GradientOfNonScalar.of),
)
