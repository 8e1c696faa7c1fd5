"""Keys of parameter groups that mean a rate or a decay, and that their optimizer does not know."""

from __future__ import annotations

import ast
import linecache
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch.optim import Optimizer

from safeloop.autograd.sites import is_user_file
from safeloop.checks.check import EventCheck
from safeloop.checks.events import Event, LoopState, Update
from safeloop.checks.source import Place
from safeloop.checks.views import SetupView
from safeloop.checks.wording import listed
from safeloop.faults import Fault

_FACTORS: dict[str, tuple[str, ...]] = {
    "lr": ("lr_mult", "lr_scale", "lr_factor", "lr_multiplier", "lr_ratio", "lr_coef"),
    "weight_decay": ("weight_decay_mult", "wd_mult", "decay_mult", "wd_scale", "wd_multiplier", "wd_factor"),
}
_VALUES: dict[str, tuple[str, ...]] = {
    "weight_decay": ("wd", "weightdecay", "weight_decay_rate"),
    "lr": ("learning_rate",),
}
_ENOUGH = 20
"""Steps after which nobody is going to apply a factor any more."""
_FEW = 10
"""The same where the watch ends."""


class GroupKeyIgnored(EventCheck):
    """A parameter group says how fast it is to train, under a key that the optimizer does not know.

    ## What it does
    Looks at the groups of torch's optimizers for a factor of the rate (`lr_mult`, `lr_scale`, ...) or of the decay
    that differs between groups whose rate is the same, and for a decay under another name (`wd`). Left out is a key
    that the code of the program reads anywhere. A Trainer looks before the first step; in a loop, it must be so at each
    of the first 20 steps, or at each of 10 where the watch ends.

    ## Why it is bad
    `torch.optim` keeps every key of a group and reads those that it knows. A backbone that was to train 100 times
    slower trains at the rate of the head, without an error.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    groups = [{"params": model[0].parameters(), "lr_mult": 0.01}, {"params": model[1].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    Run(model=model, data=[torch.randn(8, 4)], optimizers=optimizer, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    groups = [{"params": model[0].parameters(), "lr": 0.001}, {"params": model[1].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    Run(model=model, data=[torch.randn(8, 4)], optimizers=optimizer, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Write the value itself into the group: `"lr": base_lr * 0.01`, `"weight_decay": 0.0`.

    ## Source
    Documentation of `torch.optim`, "Per-parameter options".
    """

    code = "SL217"
    title = "key of a group ignored"
    severity = "warning"

    def __init__(self) -> None:
        self._steps: Counter[str] = Counter()
        self._over: set[str] = set()
        """owners whose groups differ after all, or that were told"""

    @classmethod
    def find(cls, view: SetupView) -> Iterator[Fault]:
        """One fault for each optimizer, before the first step."""
        names = {id(parameter): name for name, parameter in view.model.named_parameters()}
        for owner, optimizer in view.optimizers.items():
            yield from cls._faults(owner, optimizer, names)

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the twentieth step, if none before it used the key."""
        if not isinstance(event, Update) or event.owner in self._over or event.was_skipped:
            return
        if _ignored(state.optimizers[event.owner]) is None:
            self._over.add(event.owner)
            return
        self._steps[event.owner] += 1
        if self._steps[event.owner] == _ENOUGH:
            self._over.add(event.owner)
            yield from self._faults(event.owner, state.optimizers[event.owner], state.name_of)

    def close(self, state: LoopState) -> Iterator[Fault]:
        """Where the watch ends after fewer steps."""
        for owner, times in self._steps.items():
            if times >= _FEW and owner not in self._over:
                yield from self._faults(owner, state.optimizers[owner], state.name_of)

    @classmethod
    def _faults(cls, owner: str, optimizer: Optimizer, names: Mapping[int, str]) -> Iterator[Fault]:
        found = _ignored(optimizer)
        if found is None:
            return
        index, key, value, meant = found
        is_read, place = _uses_of(key)
        if is_read:
            return
        group = optimizer.param_groups[index]
        held = [names.get(id(p), f"{owner}[{index}]") for p in group["params"]]
        written = "" if place is None else f", {place}"
        yield cls.fault(
            f"group {index} of optimizer `{owner}` says `{key}`: {value:g}, which nobody reads: its `{meant}` is "
            f"{float(group[meant]):g}, for {listed(held)}",
            where=f"group {index} of optimizer `{owner}`{written}",
            why=f"{type(optimizer).__name__} keeps every key of a group and reads those that it knows; `{key}` is none "
            "of them",
            fix=f"write the value itself into the group: `{meant}: ...`",
            names=held,
        )


def _ignored(optimizer: Any) -> tuple[int, str, float, str] | None:
    """A group, a key, its value, and what it means, where that is not so; None for none."""
    if not str(getattr(type(optimizer).step, "__module__", "")).startswith("torch.optim."):
        return None
    groups = [(i, g) for i, g in enumerate(optimizer.param_groups) if any(p.requires_grad for p in g["params"])]
    for meant, keys in _FACTORS.items():
        values = {_number(group.get(meant)) for _, group in groups}
        if len(values) != 1 or not values - {0.0, None}:
            continue  # the groups differ, or there is nothing to multiply
        for key in keys:
            factors = [(_number(group.get(key, 1.0)), i) for i, group in groups]
            if any(factor is None for factor, _ in factors) or len({factor for factor, _ in factors}) < 2:
                continue
            factor, index = next((factor, i) for factor, i in factors if factor != 1.0)
            return index, key, float(factor or 0.0), meant
    for meant, keys in _VALUES.items():
        for index, group in groups:
            for key in keys:
                value, used = _number(group.get(key)), _number(group.get(meant))
                if key not in optimizer.defaults and None not in (value, used) and value != used:
                    return index, key, float(value or 0.0), meant
    return None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _uses_of(key: str) -> tuple[bool, Place | None]:
    """Whether the program's own code reads a key of a mapping anywhere, and the line that writes it into one."""
    place = None
    for path in sorted(_own_files()):
        lines = linecache.getlines(path)
        if not any(key in line for line in lines):
            continue
        try:
            tree = ast.parse("".join(lines))
        except (SyntaxError, ValueError):
            continue
        if any(isinstance(node, ast.Constant) and node.value == key for node in _read(tree)):
            return True, None
        line = next((line for name, line in _written(tree) if name == key), None)
        place = place or (None if line is None else Place(path, line))
    return False, place


def _written(tree: ast.AST) -> Iterator[tuple[object, int]]:
    """The keys of displays, and those that are assigned to, with their lines."""
    for node in ast.walk(tree):
        keys = node.keys if isinstance(node, ast.Dict) else []
        keys = [node.slice] if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) else keys
        yield from ((key.value, key.lineno) for key in keys if isinstance(key, ast.Constant))
        if isinstance(node, ast.keyword):
            yield node.arg, node.lineno


def _read(tree: ast.AST) -> Iterator[ast.AST | None]:
    """The expressions that may choose an item: indices, arguments, what is compared, or given a name for later."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            yield node.slice
        elif isinstance(node, ast.Call):
            yield from (*node.args, *(keyword.value for keyword in node.keywords))
        elif isinstance(node, ast.Compare):
            yield from (node.left, *node.comparators)
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr, ast.Return)):
            yield from _items(node.value)
        elif isinstance(node, (ast.For, ast.comprehension)):
            yield from _items(node.iter)
        elif isinstance(node, ast.arguments):
            yield from (*node.defaults, *node.kw_defaults)
        elif isinstance(node, ast.MatchMapping):
            yield from node.keys


def _items(value: ast.expr | None) -> Iterator[ast.expr | None]:
    yield from value.elts if isinstance(value, (ast.Tuple, ast.List, ast.Set)) else [value]


def _own_files() -> set[str]:
    """The files of the program and its modules, without what is installed; and the cells of a notebook."""
    modules = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    found = {path for path in (*modules, *list(linecache.cache)) if isinstance(path, str) and path}
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        found.add(frame.f_code.co_filename)
    return {path for path in found if "-packages" not in path and is_user_file(path)}
