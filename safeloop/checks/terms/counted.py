"""Parts of a loss that are added twice: by themselves, and within a total of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from safeloop.autograd.numbers import number_of
from safeloop.autograd.sites import Site
from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck
from safeloop.checks.source import at
from safeloop.checks.terms.constants import ADDS
from safeloop.faults import Fault

_FACTORS = ("MulBackward0", "DivBackward0")
_MOST = 256
"""Addends of a loss that are looked at."""
_KEPT = 2000
"""Nodes of scalars whose lines are kept."""


@dataclass(frozen=True, slots=True)
class _Addend:
    """One way in which a scalar enters a sum."""

    node: Any
    base: Any
    """what a constant factor multiplies; the node itself without one"""
    sums: tuple[Any, ...]
    """the inner sums that it enters through, from the outermost one on"""


class PartCountedTwice(CallCheck):
    """The loss adds up its parts and, beside them, a total of the same parts.

    ## What it does
    Walks from the loss through sums of scalars alone, and looks for an inner sum of two or more parts, all of which the
    loss contains by themselves too; and for one part that a function adds to a total, and another function adds to
    that total once more. A sum that is used twice as a whole, a part that one function repeats, and parts and sums
    with factors of their own are weights that somebody has chosen, and are not told. Cost: about 2 us for each addend.

    ## Why it is bad
    The gradients of the parts count twice, as if the learning rate were twice what is written, and the balance with all
    other parts is shifted. It happens where a total is stored beside its parts for the log, and everything in that
    dictionary is added up later.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            out = self.model(batch)
            parts = {"loss_fit": F.mse_loss(out, batch), "loss_size": out.square().mean()}
            parts["loss"] = parts["loss_fit"] + parts["loss_size"]
            return sum(value for key, value in parts.items() if "loss" in key)

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 4), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            out = self.model(batch)
            parts = {"loss_fit": F.mse_loss(out, batch), "loss_size": out.square().mean()}
            return sum(value for key, value in parts.items() if "loss" in key)

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 4), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Add the parts or the total, not both. What is kept for the log is best kept as a number (`.item()`), or detached.

    ## Source
    https://github.com/jcjohnson/densecap/issues/32; https://github.com/microsoft/protein-frame-flow/issues/23.
    """

    code = "SL461"
    title = "part of the loss counted twice"
    severity = "warning"
    hears = ADDS | {"stack"}

    def __init__(self) -> None:
        self._sites: dict[int, Site | None] = {}
        """the node of a scalar that was added, or of a sum -> the line that made it"""
        self._told: set[str] = set()

    def hear(self, call: Call) -> Iterator[Fault]:
        """Remember the lines of scalars that are added."""
        if len(self._sites) > _KEPT:
            self._sites.clear()
        scalars = [t for t in call.tensors if not t.dim() and t.grad_fn is not None]
        for tensor in scalars if isinstance(call.out, Tensor) else ():
            self._sites.setdefault(_number(tensor.grad_fn), call.tape.site_of(tensor))
        if scalars and call.out.grad_fn is not None:
            self._sites[_number(call.out.grad_fn)] = call.site
        return iter(())

    def summed(self, roots: Iterable[Tensor]) -> Iterator[Fault]:
        """The faults of losses that are about to be differentiated."""
        for root in roots:
            addends = [] if root.grad_fn is None else list(_addends(root.grad_fn))
            if len({addend.base for addend in addends}) == len(addends):
                continue
            yield from self._repeated(root, addends)
            found = _twice(addends)
            if found is None:
                continue
            total, parts = found
            sites = (self._sites.get(_number(part.base)) or self._sites.get(_number(part.node)) for part in parts)
            lines = [at(site, "an unknown line") for site in sites]
            place = at(self._sites.get(_number(total)), "a sum")
            if place not in self._told:
                self._told.add(place)
                yield self.fault(
                    f"{len(parts)} parts of the loss are added twice: each by itself, and within a total of them",
                    where=f"the total: {place}; added to its parts at {at(self._sites.get(_number(root.grad_fn)), '?')}"
                    f"; the parts: {'; '.join(dict.fromkeys(lines))}",
                    why="the gradients of these parts count twice, and the balance with everything else is shifted",
                    fix="add the parts or their total, not both: keep the total for the log out of what is added up, "
                    "or store it as a number (`.item()`)",
                )

    def _repeated(self, root: Tensor, addends: list[_Addend]) -> Iterator[Fault]:
        """One part that is added to a total in one function, and to that total again in another one."""
        for outer, inner in _again(addends):
            first = self._sites.get(_number(inner.sums[-1]))
            second = self._sites.get(_number(outer.sums[-1] if outer.sums else root.grad_fn))
            place = f"{at(first, 'an unknown line')}; once more at {at(second, 'an unknown line')}"
            if first is None or second is None or _function(first) == _function(second) or place in self._told:
                continue
            self._told.add(place)
            yield self.fault(
                f"a part of the loss is added twice, by {first.name} and by {second.name}",
                where=f"{place}; the part: {at(self._sites.get(_number(inner.node)), 'an unknown line')}",
                why="the total already holds the part: its gradient counts twice, and the balance with everything else "
                "is shifted",
                fix="add it in one place; where it is to weigh more, give it a factor",
            )


def _again(addends: list[_Addend]) -> Iterator[tuple[_Addend, _Addend]]:
    """Parts beside a sum of several that holds the very same part."""
    for outer in addends:
        depth = len(outer.sums)
        for inner in addends:
            is_same = inner is not outer and inner.node is outer.node
            if is_same and len(inner.sums) > depth and inner.sums[:depth] == outer.sums:
                yield outer, inner


def _function(site: Site) -> tuple[str, str]:
    return site.path, site.name


def _twice(addends: list[_Addend]) -> tuple[Any, list[_Addend]] | None:
    """The first made sum inside of a sum all of whose parts are added beside it too, and the parts."""
    inner = {node for addend in addends for node in addend.sums}
    for total in sorted(inner, key=_number):
        inside = [addend for addend in addends if total in addend.sums]
        beside = {addend.node for addend in addends if total not in addend.sums}
        parts = list(dict.fromkeys(addend.base for addend in inside))
        is_repeated = all(addend.node in beside or addend.base in beside for addend in inside)
        if 1 < len(parts) == len(inside) and is_repeated and any(addend.node in beside for addend in inside):
            return total, inside
    return None


def _addends(root: Any) -> Iterator[_Addend]:
    """What a scalar is the sum of; factors are looked through where what they multiply is no sum."""
    waiting: list[tuple[Any, tuple[Any, ...]]] = [(root, ())]
    count = 0
    while waiting and count < _MOST:
        node, sums = waiting.pop()
        count += 1
        below = _summed(node)
        if below is not None:
            waiting += [(part, sums if node is root else (*sums, node)) for part in below]
            continue
        ways = [way for way, _ in node.next_functions if way is not None]
        is_factor = node.name() in _FACTORS and len(ways) == 1 and _is_scalar(ways[0])
        yield _Addend(node, ways[0] if is_factor else node, sums)


def _summed(node: Any) -> list[Any] | None:
    """The scalars that a node adds up; None where it is no sum of scalars."""
    if not _is_scalar(node):
        return None
    ways = [way for way, _ in node.next_functions if way is not None]
    if node.name() == "AddBackward0" and node._saved_alpha == 1 and ways and all(map(_is_scalar, ways)):
        return ways
    if node.name() == "SumBackward0" and ways and ways[0].name() == "StackBackward0":
        parts = [way for way, _ in ways[0].next_functions if way is not None]
        return parts if all(map(_is_scalar, parts)) else None
    return None


def _is_scalar(node: Any) -> bool:
    """Whether a node has made one scalar; what is not known is none."""
    made: Any = getattr(node, "_input_metadata", ())
    return len(made) == 1 and not len(made[0].shape)


def _number(node: Any) -> int:
    return -1 if node is None else number_of(node)
