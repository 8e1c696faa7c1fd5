"""Optimizers that are not torch's own, and move what has no gradient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from safeloop.checks.check import Check
from safeloop.checks.wording import listed
from safeloop.faults import Fault

_PATIENCE = 3


class MovedWithoutGradient(Check):
    """An optimizer changes parameters whose gradient is None.

    ## What it does
    Compares the sum of each parameter without a gradient before and after the step of an optimizer whose class is not
    one of torch's, on the iterations that are looked at in depth, and tells at the third change. Cost: two sums for
    each such parameter.

    ## Why it is bad
    A parameter whose gradient is None took no part in the loss. torch's optimizers leave it alone; one that applies
    weight decay or momentum to it pulls it towards zero, or on, while nothing trains it.

    ## Bad
    ```python
    class Decaying(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1})

        @torch.no_grad()
        def step(self):
            for p in self.param_groups[0]["params"]:
                p.mul_(0.99)
                if p.grad is not None:
                    p.sub_(0.1 * p.grad)

    model = nn.ModuleDict({"used": nn.Linear(4, 1), "idle": nn.Linear(4, 1)})
    optimizer = Decaying(model.parameters())
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(4):
            optimizer.zero_grad()
            model["used"](torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            audit.step()
    ```
    ## Good
    ```python
    class Decaying(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1})

        @torch.no_grad()
        def step(self):
            for p in self.param_groups[0]["params"]:
                if p.grad is not None:
                    p.mul_(0.99).sub_(0.1 * p.grad)

    model = nn.ModuleDict({"used": nn.Linear(4, 1), "idle": nn.Linear(4, 1)})
    optimizer = Decaying(model.parameters())
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(4):
            optimizer.zero_grad()
            model["used"](torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            audit.step()
    ```
    ## Fix
    Begin the loop of `step()` with `if p.grad is None: continue`.

    ## Source
    https://github.com/KellerJordan/Muon/issues/54.
    """

    code = "SL670"
    title = "moved without a gradient"
    severity = "warning"

    def __init__(self) -> None:
        self._before: dict[str, dict[str, tuple[Tensor, float]]] = {}
        self._times: Counter[str] = Counter()

    def before(self, owner: str, optimizer: Optimizer, absent: Mapping[str, Tensor]) -> None:
        """A step is about to run; `absent` are the owner's trainable parameters without a gradient."""
        is_theirs = not type(optimizer).__module__.startswith("torch.optim")
        self._before[owner] = {n: (p, _total(p)) for n, p in absent.items() if p.requires_grad} if is_theirs else {}

    def after(self, owner: str, optimizer: Optimizer, where: str) -> Iterator[Fault]:
        """The step has run."""
        moved = [name for name, (parameter, total) in self._before.pop(owner, {}).items() if _total(parameter) != total]
        if not moved:
            return
        self._times[owner] += 1
        if self._times[owner] == _PATIENCE:
            yield self.fault(
                f"`{owner}` ({type(optimizer).__name__}) has changed {listed(moved)}, whose gradient is None",
                where=where,
                why="no loss of this step depends on them; weight decay or momentum is applied to them all the same",
                fix="leave out in `step()` what has no gradient: `if p.grad is None: continue`",
                names=moved,
            )


def _total(parameter: Tensor) -> float:
    with torch.no_grad():
        return float(parameter.sum(dtype=torch.float64)) if parameter.is_floating_point() else 0.0
