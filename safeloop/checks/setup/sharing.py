"""One network under two names, where a copy of it was meant."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from torch import nn

from safeloop.checks.check import Check
from safeloop.checks.setup.roles import is_counterpart, words
from safeloop.checks.views import SetupView
from safeloop.checks.wording import counted
from safeloop.faults import Fault

_MEMBERS = frozenset({"experts", "ensemble", "critics", "members"})
"""lists whose entries are there to differ; a list of `layers` or `blocks` may be one block, used many times"""


class CopyIsTheOriginal(Check):
    """A target, teacher or averaged network is the trained network itself.

    ## What it does
    Looks for two networks side by side (attributes of one module, entries of a dict) that share all their parameters
    while the name of one says that it is kept apart: `target`, `teacher`, `ema`, `momentum`, `old`, `frozen`,
    `reference`, ... beside `online`, `policy`, `student` or the same name without that word. Also twin critics
    (`critic1`, `critic2`) and the members of `experts`, `ensemble` or `critics` that are one module. Single tied
    tensors, siamese encoders and a block used many times are left alone.

    ## Why it is bad
    `target = online` copies nothing, nor does `copy.copy`: the target moves with every step, and what it was there for
    (a fixed target, a slow average, a second opinion) does not happen. Nothing fails; training gets unstable or
    collapses.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            with torch.no_grad():
                wanted = self.model["target"](batch)
            return (self.model["online"](batch) - 0.9 * wanted).square().mean()

    online = nn.Linear(4, 1)
    model = nn.ModuleDict({"online": online, "target": online})
    Run(model=model, data=[torch.randn(8, 4)], optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    import copy

    class Run(sl.Trainer):
        def loss(self, batch):
            with torch.no_grad():
                wanted = self.model["target"](batch)
            return (self.model["online"](batch) - 0.9 * wanted).square().mean()

    online = nn.Linear(4, 1)
    model = nn.ModuleDict({"online": online, "target": copy.deepcopy(online).requires_grad_(False)})
    Run(model=model, data=[torch.randn(8, 4)], optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Write `target = copy.deepcopy(online).requires_grad_(False)`; build experts and twin critics one by one, in a list
    comprehension instead of `[net] * n`. Where one network for both is meant, accept it:
    `audit.accept: {SL212: [target]}`.

    ## Source
    https://github.com/higgsfield/RL-Adventure/issues/32.
    """

    code = "SL212"
    title = "copy is the original"
    severity = "warning"

    @classmethod
    def find(cls, view: SetupView) -> Iterator[Fault]:
        """One fault for each pair, or for each list of one module."""
        for path, parent in view.model.named_modules():
            children = {name: module for name, module in parent._modules.items() if module is not None}
            if len(children) < 2:
                continue
            for name, other in _pairs(children):
                yield cls._fault(path, parent, name, other, children)
            if isinstance(parent, nn.ModuleList) and _is_for_members(path) and _are_one(list(children.values())):
                yield cls._of_members(path, list(children.values()))

    @classmethod
    def _fault(cls, path: str, parent: nn.Module, name: str, other: str, children: Mapping[str, nn.Module]) -> Fault:
        full, full_other = (f"{path}.{key}" if path else key for key in (name, other))
        number = counted(len(list(children[name].parameters())), "parameter")
        is_one = children[name] is children[other]
        return cls.fault(
            f"`{full}` and `{full_other}` "
            + (f"are one module, with {number}" if is_one else f"share all their parameters ({number})"),
            where=f"`{full}` ({type(children[name]).__name__}) in {type(parent).__name__}",
            why=f"`{name} = {other}` copies nothing, nor does `copy.copy`: every step on one moves both",
            fix=f"`{name} = copy.deepcopy({other})`, with `.requires_grad_(False)` where it is not trained",
            names=(full, full_other),
        )

    @classmethod
    def _of_members(cls, path: str, members: list[nn.Module]) -> Fault:
        return cls.fault(
            f"the {len(members)} entries of `{path}` are one {type(members[0]).__name__}, with the same parameters",
            where=f"`{path}`",
            why="`[module] * n` repeats one module: its members cannot differ",
            fix=f"build each on its own: `nn.ModuleList([{type(members[0]).__name__}(...) for _ in range("
            f"{len(members)})])`",
            names=(path,),
        )


def _pairs(children: Mapping[str, nn.Module]) -> Iterator[tuple[str, str]]:
    parameters = {name: frozenset(module.parameters()) for name, module in children.items()}
    for first, second in itertools.combinations(children, 2):
        shared = parameters[first]
        if not shared or shared != parameters[second] or isinstance(children[first], nn.Embedding):
            continue
        if not any(p.requires_grad for p in shared) or hasattr(children[first], "disable_adapter"):
            continue  # with its adapters off, a PEFT model is its own reference
        if is_counterpart(second, first) or _are_twins(first, second):
            yield second, first
        elif is_counterpart(first, second):
            yield first, second


def _are_twins(first: str, second: str) -> bool:
    """Whether these are twin critics, `critic1` and `critic2`, whose smaller value is taken."""
    plain = [[word for word in words(name) if not word.isdigit()] for name in (first, second)]
    return plain[0] == plain[1] and first != second and bool({"critic", "q", "qf", "qnet"}.intersection(plain[0]))


def _is_for_members(path: str) -> bool:
    named = words(path.rpartition(".")[2])
    return bool(_MEMBERS.intersection(named)) and "shared" not in named


def _are_one(modules: list[nn.Module]) -> bool:
    sets = [frozenset(module.parameters()) for module in modules]
    return bool(sets[0]) and all(each == sets[0] for each in sets) and any(p.requires_grad for p in sets[0])
