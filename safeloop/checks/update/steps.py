"""Optimizers that never step, and parameters that move although they took no part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Set
from typing import Any

from torch import Tensor

from safeloop.checks.check import EventCheck
from safeloop.checks.events import Backward, Event, GradientUse, Iteration, LoopState, Update
from safeloop.checks.source import at
from safeloop.checks.wording import listed
from safeloop.faults import Fault

_ENOUGH = 5
"""Iterations after which an optimizer that was never stepped has been forgotten, where the watch ends."""
_SURELY = 40


class OptimizerNeverSteps(EventCheck):
    """Gradients are computed for an optimizer that is never stepped.

    ## What it does
    Counts the backward passes that reach the parameters of each optimizer, and its steps. Speaks where there were 5
    passes or more and no step until the watch ends, or another optimizer was stepped 40 times. Left out is an optimizer
    whose parameters have changed all the same (a wrapper or a line of the loop updates them), and one whose gradients
    the loop reads. Cost: a copy of its smallest parameter.

    ## Why it is bad
    Its gradients are computed and never applied: these parameters keep their initial values, and the rest of the model
    learns around them. With two optimizers, the cause is often one that is stepped twice.

    ## Bad
    ```python
    body, head = nn.Linear(4, 4), nn.Linear(4, 1)
    opt_body, opt_head = torch.optim.SGD(body.parameters(), lr=0.01), torch.optim.SGD(head.parameters(), lr=0.01)
    models, optimizers = {"body": body, "head": head}, {"opt_body": opt_body, "opt_head": opt_head}
    with sl.audit(model=models, optimizers=optimizers, on_fault="collect") as audit:
        for _ in range(6):
            opt_body.zero_grad()
            opt_head.zero_grad()
            F.mse_loss(head(body(torch.randn(8, 4))), torch.randn(8, 1)).backward()
            opt_head.step()
            audit.step()
    ```
    ## Good
    ```python
    body, head = nn.Linear(4, 4), nn.Linear(4, 1)
    opt_body, opt_head = torch.optim.SGD(body.parameters(), lr=0.01), torch.optim.SGD(head.parameters(), lr=0.01)
    models, optimizers = {"body": body, "head": head}, {"opt_body": opt_body, "opt_head": opt_head}
    with sl.audit(model=models, optimizers=optimizers, on_fault="collect") as audit:
        for _ in range(6):
            opt_body.zero_grad()
            opt_head.zero_grad()
            F.mse_loss(head(body(torch.randn(8, 4))), torch.randn(8, 1)).backward()
            opt_head.step()
            opt_body.step()
            audit.step()
    ```
    ## Fix
    Step every optimizer after its backward pass, or freeze the parameters of one that should not train.

    ## Source
    https://github.com/huggingface/accelerate/issues/2665; https://github.com/pytorch/pytorch/issues/149205.
    """

    code = "SL635"
    title = "optimizer never steps"

    def __init__(self) -> None:
        self._passes: Counter[str] = Counter()
        self._told: set[str] = set()
        self._values: dict[str, tuple[int, Tensor, Tensor]] = {}
        self._read: set[str] = set()

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """Where another optimizer was stepped 40 times and this one never."""
        if isinstance(event, Backward):
            for owner, names in state.owners.items():
                if not names.isdisjoint(event.reached):
                    self._passes[owner] += 1
                    self._note(owner, state)
        elif isinstance(event, GradientUse):
            self._read |= event.parameters
        elif isinstance(event, Update) and event.was_skipped:
            self._told.add(event.owner)  # a gradient scaler keeps it from stepping: that is another fault
        if isinstance(event, Iteration) and max(state.updates.values(), default=0) >= _SURELY:
            yield from self._never(state)

    def close(self, state: LoopState) -> Iterator[Fault]:
        """Where the watch ends, and at least 5 backward passes were for nothing."""
        yield from self._never(state)

    def _note(self, owner: str, state: LoopState) -> None:
        if owner in self._values or state.updates.get(owner):
            return
        held = _parameters(state.optimizers[owner])
        smallest = min(held, key=lambda p: p.numel())
        self._values[owner] = sum(p._version for p in held), smallest, smallest.detach().clone()

    def _has_changed(self, owner: str, state: LoopState) -> bool:
        versions, smallest, before = self._values[owner]
        return versions != sum(p._version for p in _parameters(state.optimizers[owner])) or not bool(
            (smallest.detach() == before).all()
        )

    def _never(self, state: LoopState) -> Iterator[Fault]:
        for owner, names in state.owners.items():
            if state.updates.get(owner) or owner in self._told or self._passes[owner] < _ENOUGH:
                continue
            if names & self._read or self._has_changed(owner, state):
                continue
            self._told.add(owner)
            last = next(iter(state.last_update.values()), None)
            others = ", ".join(f"`{other}` {count} times" for other, count in state.updates.items())
            yield self.fault(
                f"optimizer `{owner}` was never stepped, though {self._passes[owner]} backward passes reached its "
                f"parameters {listed(sorted(names))}" + (f"; stepped were {others}" if others else ""),
                where=f"{at(last.site, 'a line')} steps `{last.owner}`" if last is not None else f"optimizer `{owner}`",
                why="its gradients are computed and never applied: these parameters keep their initial values",
                fix=f"call `{owner}.step()` after its backward pass; look for another optimizer that is stepped twice",
                names=sorted(names),
            )


class UpdatedWithoutPart(EventCheck):
    """A parameter that took no part in the step is moved all the same, by weight decay or momentum.

    ## What it does
    Looks for parameters whose gradient is exactly zero because it was filled with zeros and no backward pass has
    reached them since, where weight decay, or momentum that they have from earlier steps, still moves them. Speaks at
    the third such step of an optimizer.

    ## Why it is bad
    An optimizer leaves a parameter alone whose gradient is None. With zeros, weight decay shrinks it at every step and
    momentum pushes it on: a branch that is sampled rarely decays faster than it learns.

    ## Bad
    ```python
    model = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for i in range(8):
            optimizer.zero_grad(set_to_none=False)
            F.mse_loss(model[i % 2](torch.randn(8, 4)), torch.randn(8, 1)).backward()
            optimizer.step()
            audit.step()
    ```
    ## Good
    ```python
    model = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for i in range(8):
            optimizer.zero_grad()
            F.mse_loss(model[i % 2](torch.randn(8, 4)), torch.randn(8, 1)).backward()
            optimizer.step()
            audit.step()
    ```
    ## Fix
    Leave `set_to_none` of `zero_grad` at its default, True.

    ## Source
    https://github.com/megvii-model/DetNAS/issues/3.
    """

    code = "SL636"
    title = "updated without taking part"
    severity = "warning"

    def __init__(self) -> None:
        self._times: Counter[str] = Counter()
        self._names: dict[str, set[str]] = {}
        self._reached: set[str] = set()

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the third step with a zero gradient that no backward pass has written, where the optimizer still moves."""
        if isinstance(event, Backward):
            self._reached |= event.reached
        if not isinstance(event, Update) or not event.is_deep or not state.is_known or event.has_closure:
            return
        idle = {n for n in event.zero if n in state.held and not state.held[n].passes and not state.held[n].is_manual}
        idle -= event.frozen  # those are another fault
        if idle:
            idle &= moves_without_gradient(state.optimizers[event.owner], self._reached, state.name_of)
        if not idle or event.was_skipped:
            return
        self._names.setdefault(event.owner, set()).update(idle)
        self._times[event.owner] += 1
        if self._times[event.owner] != 3:
            return
        names = sorted(self._names[event.owner])
        yield self.fault(
            f"{listed(names)} took no part in some steps, and `{event.owner}` moved them all the same",
            where=at(event.site, f"step of `{event.owner}`"),
            why="their gradient is zero, not None: zero_grad(set_to_none=False) keeps it, and weight decay and "
            "momentum act on every parameter that has one",
            fix="leave `set_to_none` at its default (True): a parameter without a gradient is left alone",
            names=names,
        )


def moves_without_gradient(optimizer: Any, trained: Set[str], name_of: Mapping[int, str]) -> set[str]:
    """The parameters that a step moves although their gradient is zero: by weight decay, or by earlier gradients."""
    moved = set()
    for group in optimizer.param_groups:
        if not group.get("lr"):
            continue
        names = {name_of[id(p)] for p in group["params"] if id(p) in name_of}
        betas = group.get("betas")
        remembers = group.get("momentum") or (isinstance(betas, (tuple, list)) and betas and betas[0])
        moved |= names if group.get("weight_decay") else names & trained if remembers else set()
    return moved


def _parameters(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
