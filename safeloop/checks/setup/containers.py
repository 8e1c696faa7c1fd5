"""Modules that a model keeps where its parameters are not looked for."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from safeloop.checks.check import Check
from safeloop.checks.setup.holders import module_holders
from safeloop.checks.setup.roles import is_kept_out
from safeloop.checks.setup.scan import module_containers
from safeloop.checks.views import SetupView
from safeloop.checks.wording import agree, counted, listed
from safeloop.faults import Fault


class ModulesInPlainContainer(Check):
    """Modules are kept in a Python list, tuple or dict, where the model does not find their parameters.

    ## What it does
    Looks through the attributes of every module for lists, tuples, dicts and deques of modules whose trainable
    parameters are not among the model's. Where ready optimizers hold all of them they do train, and the fault is a
    warning. A single module in a container whose name begins with an underscore or says that it is kept out
    (`self._net = [net]`, `self.teacher = [net]`) is hidden on purpose and left alone. The same is looked for in what
    `forward` reads otherwise: an object that is no `nn.Module` and keeps modules, a function, `functools.partial` or
    bound method that uses some. There a module in eval mode, or one that an optimizer holds, is kept out on purpose.

    ## Why it is bad
    `parameters()`, `state_dict()`, `.to()`, `train()` and `eval()` do not reach these modules: they keep their
    initial weights, on the device where they were made, and a checkpoint does not hold them. The loss still goes
    down, through the rest.

    ## Bad
    ```python
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = [nn.Linear(4, 4) for _ in range(3)]
            self.out = nn.Linear(4, 1)

        def forward(self, x):
            for block in self.blocks:
                x = torch.relu(block(x))
            return self.out(x)

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    Run(model=Deep(), data=[torch.randn(8, 4)], optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
            self.out = nn.Linear(4, 1)

        def forward(self, x):
            for block in self.blocks:
                x = torch.relu(block(x))
            return self.out(x)

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    Run(model=Deep(), data=[torch.randn(8, 4)], optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Use `nn.ModuleList` for a list or tuple and `nn.ModuleDict` for a dict, make a class that keeps modules a subclass
    of `nn.Module`, and register a module before a function uses it. A module that must stay outside (a frozen
    teacher) gets `requires_grad_(False)`, so that it is clear that nobody means to train it.

    ## Source
    https://github.com/pytorch/pytorch/issues/59925; documentation of `torch.nn.ModuleList`.
    """

    code = "SL208"
    title = "modules in a plain container"

    @classmethod
    def find(cls, view: SetupView) -> Iterator[Fault]:
        """One fault for each such container."""
        registered = set(view.model.parameters())
        held = {tensor for tensors in view.ownership.foreign.values() for tensor in tensors}
        for found in module_containers(view.model):
            is_hidden = found.attribute.startswith("_") or is_kept_out(found.attribute)
            if is_hidden and len(found.modules) == 1:
                continue
            hidden = {p for module in found.modules for p in module.parameters() if p.requires_grad} - registered
            if not hidden:
                continue
            right = "nn.ModuleDict" if found.kind.lower().endswith("dict") else "nn.ModuleList"
            classes = dict.fromkeys(type(module).__name__ for module in found.modules)
            are_held = hidden <= held
            yield cls.fault(
                f"`{found.path}` is a {found.kind} of {counted(len(found.modules), 'module')} ({listed(classes)}), "
                f"whose {counted(len(hidden), 'trainable parameter')} {agree(len(hidden), 'is', 'are')} not among the "
                "model's parameters",
                where=f"attribute `{found.path}` of {type(found.module).__name__}",
                why=f"a {found.kind} hides modules from `parameters()`, `state_dict()`, `.to()` and `train()`: "
                + (
                    "a ready optimizer trains them, but they are not saved or moved" if are_held else "they never train"
                ),
                fix=f"write `self.{found.attribute} = {right}(...)`, or freeze them by `requires_grad_(False)`",
                severity="warning" if are_held else "error",
                names=(found.path,),
            )
        yield from cls._of_holders(view, registered, held)

    @classmethod
    def _of_holders(cls, view: SetupView, registered: set[nn.Parameter], held: set[Tensor]) -> Iterator[Fault]:
        for found in module_holders(view.model):
            hidden = {p for module in found.modules for p in module.parameters() if p.requires_grad} - registered
            if not hidden or hidden & held or not any(module.training for module in found.modules):
                continue
            classes = dict.fromkeys(type(module).__name__ for module in found.modules)
            yield cls.fault(
                f"`{found.path}` is {found.kind}, which keeps {counted(len(found.modules), 'module')} "
                f"({listed(classes)}), whose {counted(len(hidden), 'trainable parameter')} "
                f"{agree(len(hidden), 'is', 'are')} not among the model's parameters",
                where=f"attribute `{found.path}` of {type(found.module).__name__}",
                why="only modules that are attributes of a module are found by `parameters()`, `state_dict()`, `.to()` "
                "and `train()`: these never train",
                fix=found.fix,
                names=(found.path,),
            )
