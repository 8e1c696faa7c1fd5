"""Learning rates that were handed to the wrong parameter groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from safeloop.checks.check import Check
from safeloop.checks.views import SetupView
from safeloop.checks.wording import listed
from safeloop.faults import Fault

_APART = 1e4
"""rates further apart than this are no choice of one scale"""
_NEW_HEAD = 1e5
"""the same where the later layers have the larger rate, as a new head on a pretrained body has"""
_RUNG = 1e3
"""a ladder of rates (a decay per layer) has smaller steps, however long it is"""
_ROUNDING = 1 + 1e-9


@dataclass(frozen=True)
class _Group:
    owner: str
    kind: type[Optimizer]
    index: int
    rate: float
    positions: tuple[int, ...]
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{_modules(self.names)}: lr {self.rate:.3g}"


class LearningRatesFarApart(Check):
    """Two parameter groups have learning rates so far apart that one of them hardly moves.

    ## What it does
    Compares the learning rates of the groups of an optimizer, and of optimizers of one class, before the first step:
    the initial ones, where a scheduler has begun. It warns where they differ 10,000 times or more (100,000 times where
    the later layers have the larger rate, as a new head on a pretrained body has). A ladder of rates, each within 1,000
    times of the next, is a choice, and so is a rate of zero.

    ## Why it is bad
    Rates zipped to the wrong groups, or a missing exponent, leave one part of the model standing still or throw another
    one about. The loss may still go down, through the rest.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    rates = [0.5, 1e-6]
    groups = [{"params": layer.parameters(), "lr": lr} for layer, lr in zip(model, rates)]
    Run(model=model, data=[torch.randn(8, 4)], optimizers=torch.optim.SGD(groups), run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    rates = [1e-3, 1e-2]
    groups = [{"params": layer.parameters(), "lr": lr} for layer, lr in zip(model, rates)]
    Run(model=model, data=[torch.randn(8, 4)], optimizers=torch.optim.SGD(groups), run={"max_steps": 1}).fit()
    ```
    ## Fix
    Check which rate belongs to which group. What is not to train is frozen (`frozen:`, `requires_grad_(False)`)
    instead of being given a tiny rate. Where the rates are meant, accept it: `audit.accept: {SL213: ["*"]}`.

    ## Source
    Devlin et al., BERT (2019), and Howard and Ruder, ULMFiT (2018), for rates that differ by layer on purpose;
    safeloop's own bounds.
    """

    code = "SL213"
    title = "learning rates far apart"
    severity = "warning"

    @classmethod
    def find(cls, view: SetupView) -> Iterator[Fault]:
        """One fault for each class of optimizer."""
        groups = list(_groups(view))
        for kind in dict.fromkeys(group.kind for group in groups):
            found = _far_apart([group for group in groups if group.kind is kind])
            if found is not None:
                yield cls._fault(*found)

    @classmethod
    def _fault(cls, slow: _Group, fast: _Group) -> Fault:
        owners = dict.fromkeys(
            f"group {group.index} of optimizer `{group.owner}`" for group in sorted((slow, fast), key=_place)
        )
        paths = dict.fromkeys(f"`optimizers.{group.owner}`" for group in (slow, fast))
        return cls.fault(
            f"the learning rates differ {fast.rate / slow.rate:.2g} times: {fast}; {slow}",
            where=" and ".join(owners),
            why="at the smaller rate parameters hardly move, or at the larger one they diverge: rates zipped to the "
            "wrong groups look like this, and so does a missing exponent",
            fix=f"check which rate belongs to which group in {' and '.join(paths)}; freeze what is not to train",
            names=(*fast.names, *slow.names),
        )


def _groups(view: SetupView) -> Iterator[_Group]:
    names = {parameter: name for name, parameter in view.model.named_parameters()}
    order = {name: index for index, name in enumerate(names.values())}
    frozen = set(view.ownership.frozen)
    for owner, optimizer in view.optimizers.items():
        for index, group in enumerate(optimizer.param_groups):
            rate = _rate(group)
            training = [p for p in group["params"] if p.requires_grad and names.get(p) not in frozen]
            if rate > 0 and any(is_lazy(p) or p.dim() > 0 for p in training):
                known = tuple(names.get(p, f"{owner}[{index}]") for p in training)
                positions = tuple(order[name] for name in known if name in order)
                yield _Group(owner, type(optimizer), index, rate, positions, known)


def _rate(group: Mapping[str, Any]) -> float:
    """The rate that the group begins with, before a scheduler or a warm-up; 0 where there is none."""
    rate = group.get("initial_lr", group.get("lr"))
    try:
        return float(rate) if rate is not None else 0.0
    except (TypeError, ValueError, RuntimeError):
        return 0.0


def _far_apart(groups: list[_Group]) -> tuple[_Group, _Group] | None:
    """The groups on both sides of the widest gap, where it is no step of a ladder."""
    ladder = sorted(groups, key=lambda group: group.rate)
    gaps = [(high.rate / low.rate, low, high) for low, high in pairwise(ladder)]
    if not gaps:
        return None
    gap, low, high = max(gaps, key=lambda found: found[0])
    if _is_later(high, low):
        return (low, high) if gap * _ROUNDING >= _NEW_HEAD else None
    whole = ladder[-1].rate / ladder[0].rate
    return (low, high) if gap * _ROUNDING >= _RUNG and whole * _ROUNDING >= _APART else None


def _is_later(one: _Group, other: _Group) -> bool:
    """Whether all of `one` comes after all of `other` in the model."""
    return bool(one.positions and other.positions) and min(one.positions) > max(other.positions)


def _place(group: _Group) -> tuple[str, int]:
    return (group.owner, group.index)


def _modules(names: tuple[str, ...]) -> str:
    return listed(dict.fromkeys(name.rpartition(".")[0] or name for name in names), 3)
