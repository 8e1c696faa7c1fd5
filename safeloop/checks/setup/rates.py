"""Learning rates that were handed to the wrong parameter groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from safeloop.checks.check import Check, EventCheck
from safeloop.checks.events import Event, LoopState, Update
from safeloop.checks.views import SetupView
from safeloop.checks.wording import listed
from safeloop.faults import Fault

_APART = 1e4
"""rates further apart than this are no choice of one scale"""
_NEW_HEAD = 1e5
"""the same where the later layers have the larger rate, as a new head on a pretrained body has"""
_UPSIDE_DOWN = 100
"""the same where a body, by its name, has the larger rate than the head on it"""
_BODIES = frozenset(("backbone", "encoder", "features", "feature_extractor", "body", "trunk", "stem", "pretrained"))
_HEADS = frozenset(("head", "heads", "classifier", "cls_head", "lm_head", "fc", "probe"))
_RUNG = 1e3
"""a ladder of rates (a decay per layer) has smaller steps, however long it is"""
_ROUNDING = 1 + 1e-9
_ENOUGH = 10
"""steps after which a rate of zero is no warm-up any more"""


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
    the initial ones, where a scheduler has begun. It warns where they differ 10,000 times or more (over 100,000 times
    where the later layers have the larger rate, as a new head on a pretrained body has; 100 times where a `backbone` or
    `encoder` has the larger rate and the `head` or `classifier` the smaller one). A ladder of rates, each within 1,000
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


class GroupRateZero(EventCheck):
    """One parameter group has a learning rate of exactly zero, beside others that train.

    ## What it does
    In a Trainer, looks at the groups of ready optimizers before the first step. In a loop that is not ours, speaks when
    the watch ends and a group has had the rate 0 at each of 10 steps or more, while another group of the same optimizer
    had one.

    ## Why it is bad
    The group gets gradients and never moves. A rate that was computed, `lr * (batch // 256)`, comes out as 0 without an
    error. Who means to freeze parameters does it by `requires_grad_(False)`, which saves their gradients too.

    ## Bad
    ```python
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 0.1 * (8 // 256)}]
    optimizer = torch.optim.SGD(groups, lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(12):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 0.1 * (8 / 256)}]
    optimizer = torch.optim.SGD(groups, lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(12):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            audit.step()
    ```
    ## Fix
    Correct the rate; freeze the parameters by `requires_grad_(False)` where they are not to train.

    ## Source
    safeloop's own rule.
    """

    code = "SL216"
    title = "learning rate of a group is zero"
    severity = "warning"

    def __init__(self) -> None:
        self._steps: Counter[str] = Counter()
        self._positive: dict[str, set[int]] = {}

    @classmethod
    def find(cls, view: SetupView) -> Iterator[Fault]:
        """One fault for each group, before the first step."""
        names = {id(parameter): name for name, parameter in view.model.named_parameters()}
        for owner, optimizer in view.optimizers.items():
            positive = {i for i, group in enumerate(optimizer.param_groups) if _rate(group) != 0}
            yield from cls._faults(owner, optimizer, positive, names)

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """Only counts."""
        if isinstance(event, Update) and not event.was_skipped:
            self._steps[event.owner] += 1
            positive = self._positive.setdefault(event.owner, set())
            positive.update(index for index, rate in enumerate(event.rates) if rate)
        return iter(())

    def close(self, state: LoopState) -> Iterator[Fault]:
        """Where a group had no rate at any step."""
        for owner, times in self._steps.items():
            if times >= _ENOUGH:
                yield from self._faults(owner, state.optimizers[owner], self._positive[owner], state.name_of)

    @classmethod
    def _faults(cls, owner: str, optimizer: Optimizer, positive: set[int], names: Mapping[int, str]) -> Iterator[Fault]:
        for index, group in enumerate(optimizer.param_groups):
            training = [names.get(id(p), f"{owner}[{index}]") for p in group["params"] if p.requires_grad]
            if positive and index not in positive and training and "lr" in group:
                yield cls.fault(
                    f"group {index} of optimizer `{owner}` has the learning rate (lr) 0: {listed(training)}",
                    where=f"group {index} of optimizer `{owner}`",
                    why="they get gradients and never move; an integer division or a factor of 0 looks like this",
                    fix="correct the rate, or freeze them by `requires_grad_(False)` where they are not to train",
                    names=training,
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
    whole = ladder[-1].rate / ladder[0].rate
    if len(ladder) > 2 and whole * _ROUNDING >= _APART and all(_is_later(low, high) for _, low, high in gaps):
        return ladder[0], ladder[-1]  # a decay per layer the wrong way round: the later, the slower
    if _UPSIDE_DOWN * ladder[0].rate <= ladder[-1].rate * _ROUNDING and _is_upside_down(ladder[0], ladder[-1]):
        return ladder[0], ladder[-1]
    gap, low, high = max(gaps, key=lambda found: found[0])
    if _is_later(high, low):
        return (low, high) if gap > _NEW_HEAD * _ROUNDING else None
    return (low, high) if gap * _ROUNDING >= _RUNG and whole * _ROUNDING >= _APART else None


def _is_later(one: _Group, other: _Group) -> bool:
    """Whether all of `one` comes after all of `other` in the model."""
    return bool(one.positions and other.positions) and min(one.positions) > max(other.positions)


def _is_upside_down(slow: _Group, fast: _Group) -> bool:
    """Whether the slow one is a head by its name, and the fast one a body."""
    return _is_called(slow, _HEADS) and not _is_called(slow, _BODIES) and _is_called(fast, _BODIES)


def _is_called(group: _Group, words: frozenset[str]) -> bool:
    return all(words.intersection(name.split(".")) for name in group.names)


def _place(group: _Group) -> tuple[str, int]:
    return (group.owner, group.index)


def _modules(names: tuple[str, ...]) -> str:
    return listed(dict.fromkeys(name.rpartition(".")[0] or name for name in names), 3)
