"""Tensors that a model keeps where its parameters are not looked for."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from safeloop.autograd.walk import reached_leaves
from safeloop.checks.check import Check
from safeloop.checks.setup.scan import Attribute, buffer_attributes, leaf_attributes, tensor_attributes
from safeloop.checks.setup.stores import AttributeUses, attribute_uses
from safeloop.checks.views import SetupView
from safeloop.checks.wording import listed
from safeloop.faults import Fault, Severity


class PlainTensorAttribute(Check):
    """A tensor that requires grad is a plain attribute of a module, not an `nn.Parameter`.

    ## What it does
    Looks through the attributes of every module, also in lists, dicts and objects that `forward` reads, for leaf
    tensors with `requires_grad=True` that are no parameter of the model. Where a ready optimizer holds the tensor it
    does train, and the fault is a warning. An attribute that a method stores again while the model runs, or fills
    (`self.seen[key] = x`, `self.seen.append(x)`), is taken for a cache and left alone.

    ## Why it is bad
    `parameters()`, `state_dict()` and `.to()` do not know the tensor: an optimizer built from the model never updates
    it, a checkpoint does not hold it, and a move to another device leaves it behind. Nothing says so.

    ## Bad
    ```python
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)
            self.scale = torch.ones(3, requires_grad=True)

        def forward(self, x):
            return self.fc(x) * self.scale

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    Run(model=Scaled(), data=[torch.randn(8, 4)], optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.fc(x) * self.scale

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    Run(model=Scaled(), data=[torch.randn(8, 4)], optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Write `self.scale = nn.Parameter(...)`; several of them belong in an `nn.ParameterList` or `nn.ParameterDict`. A
    constant is made without `requires_grad` and registered by `register_buffer`. An input at which you differentiate
    is made a leaf where it is used, by `x.detach().requires_grad_()`; to keep it as an attribute, accept it:
    `audit.accept: {SL206: [NAME]}`.

    ## Source
    https://github.com/pytorch/pytorch/issues/20089; documentation of `torch.nn.Parameter`.
    """

    code = "SL206"
    title = "tensor that trains is not a Parameter"

    @classmethod
    def find(cls, view: SetupView) -> Iterator[Fault]:
        """One fault for each such tensor."""
        registered = set(view.model.parameters())
        held = {tensor: owner for owner, tensors in view.ownership.foreign.items() for tensor in tensors}
        found = [a for a in leaf_attributes(view.model) if a.tensor not in registered]
        uses = attribute_uses(view.model) if found else None
        for buffer in buffer_attributes(view.model):
            if buffer.tensor.is_leaf and buffer.tensor.requires_grad and buffer.tensor not in registered:
                yield cls._buffer(buffer, held.get(buffer.tensor))
        for attribute in found:
            if uses is None or attribute.attribute in uses.renewed:
                continue
            is_item = attribute.path.endswith("]") and not isinstance(attribute.tensor, nn.Parameter)
            if not (is_item and attribute.attribute in uses.filled):
                yield cls._fault(attribute, held.get(attribute.tensor), uses)

    @classmethod
    def _fault(cls, found: Attribute, owner: str | None, uses: AttributeUses) -> Fault:
        kind = "an nn.Parameter in a plain container" if isinstance(found.tensor, nn.Parameter) else "a plain tensor"
        fate = f"optimizer `{owner}` trains it, but" if owner else "no optimizer updates it,"
        return cls.fault(
            f"`{found.path}` {list(found.tensor.shape)} requires grad but is {kind}: `parameters()` does not list it",
            where=_where(found, uses),
            why=f"{fate} `state_dict()` does not save it and `.to()` does not move it",
            fix=f"write `self.{found.attribute} = nn.Parameter(...)`, nn.ParameterList or nn.ParameterDict for "
            "several; drop `requires_grad` if it is a constant",
            severity="warning" if owner else "error",
            names=(found.path,),
        )

    @classmethod
    def _buffer(cls, found: Attribute, owner: str | None) -> Fault:
        return cls.fault(
            f"buffer `{found.path}` {list(found.tensor.shape)} requires grad: `parameters()` does not list it",
            where=f"buffer `{found.path}` of {type(found.module).__name__}",
            why="a buffer is saved and moved, but "
            + (f"only optimizer `{owner}` knows it" if owner else "no optimizer updates it: it keeps its first value"),
            fix=f"write `self.{found.attribute} = nn.Parameter(...)`; where it is a constant, register it without "
            "`requires_grad`",
            severity="warning" if owner else "error",
            names=(found.path,),
        )


class NonLeafAttribute(Check):
    """A tensor that was computed from a parameter when the model was built is kept and reused.

    ## What it does
    Looks for attributes and buffers that already have a `grad_fn` before the first step, such as
    `nn.Parameter(x) * 0.1` or `self.w / self.w.norm()` in `__init__`. Left alone are views of a parameter, which follow
    it, modules with a forward pre-hook (`weight_norm`, pruning), which renew theirs, and attributes that a method
    stores again while the model runs.

    ## Why it is bad
    The result of an operation is not a leaf: it is no parameter, its `.grad` stays None and an optimizer refuses it.
    It was computed once, so that it never follows what it was computed from. Its graph is freed by the first backward
    pass, so the second one fails with "Trying to backward through the graph a second time".

    ## Bad
    ```python
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 1)) * 0.1
            self.bias = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return x @ self.w + self.bias

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    Run(model=Small(), data=[torch.randn(8, 4)], optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 1) * 0.1)
            self.bias = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return x @ self.w + self.bias

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    Run(model=Small(), data=[torch.randn(8, 4)], optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Three right ways to start from scaled values: scale the data first, `nn.Parameter(x * 0.1)`; or make the parameter
    and scale it in place, `with torch.no_grad(): self.w.mul_(0.1)`; or build the tensor from plain data and then
    require grad, `nn.Parameter(torch.full((10,), 0.5))`. What must follow a parameter (a normalised weight) is
    computed in `forward`, each time. A value kept only to be looked at is detached.

    ## Source
    https://github.com/pytorch/pytorch/issues/20089; https://github.com/karpathy/nn-zero-to-hero/issues/31.
    """

    code = "SL207"
    title = "attribute holds the result of an operation"

    @classmethod
    def find(cls, view: SetupView) -> Iterator[Fault]:
        """One fault for each such attribute: an error where a method uses it, else a warning."""
        found = [a for scan in (tensor_attributes, buffer_attributes) for a in scan(view.model)]
        found = [a for a in found if a.tensor.grad_fn is not None and not a.module._forward_pre_hooks]
        parameters = {id(parameter) for parameter in view.model.parameters()}
        found = [a for a in found if id(a.tensor._base) not in parameters]  # a view follows its parameter and trains it
        uses = attribute_uses(view.model) if found else None
        for attribute in found:
            if uses is not None and not uses.may_be_renewed(attribute.attribute):
                is_built = uses.place(attribute.module, attribute.attribute) is not None
                is_certain = is_built and attribute.attribute in uses.used
                yield cls._fault(view, attribute, "error" if is_certain else "warning", uses)

    @classmethod
    def _fault(cls, view: SetupView, found: Attribute, severity: Severity, uses: AttributeUses) -> Fault:
        made_by = found.tensor.grad_fn.name() if found.tensor.grad_fn is not None else ""
        leaves = reached_leaves(found.tensor)
        sources = [name for name, parameter in view.model.named_parameters() if parameter in leaves]
        own = f"self.{found.attribute}"
        return cls.fault(
            f"`{found.path}` {list(found.tensor.shape)} is the result of `{made_by}`, computed before the first step"
            + (f" from {listed(sources)}" if sources else " from what is no parameter of the model"),
            where=_where(found, uses),
            why="not a leaf: it never trains (its `.grad` stays None) and never follows what it was computed from; its "
            "graph is freed by the first backward pass, so that the second one fails",
            fix="compute it in `forward`, each time; a value that is only looked at is detached"
            if sources
            else f"scale the data, `{own} = nn.Parameter(x * 0.1)`; or make the parameter, `{own} = nn.Parameter(x)`, "
            f"then scale it, `with torch.no_grad(): {own}.mul_(0.1)`; or fill it, `nn.Parameter(torch.full(...))`",
            severity=severity,
            names=(found.path,),
        )


def _where(found: Attribute, uses: AttributeUses) -> str:
    place = uses.place(found.module, found.attribute)
    return f"{found}" + (f", {place}" if place is not None else "")
