"""Advantages that keep the graph of their baseline, so that the policy's loss trains the critic."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from safeloop.autograd.lineage import Mark
from safeloop.autograd.numbers import number_of
from safeloop.autograd.sites import Site
from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck
from safeloop.checks.graph.samples import is_in_log_prob
from safeloop.checks.source import at
from safeloop.checks.wording import listed
from safeloop.faults import Fault

_SUBTRACTIONS = frozenset(("sub", "__sub__", "rsub", "__rsub__", "subtract"))
_CHOICES = frozenset(("gather", "__getitem__", "cross_entropy", "nll_loss"))
_LAST = frozenset(("squeeze", "neg", "__neg__", "binary_cross_entropy_with_logits"))
_PRODUCTS = frozenset(("mul", "__mul__", "__rmul__", "multiply"))
_DRAWS = frozenset(("multinomial",))
_DRAWN = "drawn"
_SHAPED = (
    *("View", "UnsafeView", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "T", "Permute", "Select", "Slice", "Index"),
    *("IndexSelect", "Clone", "ToCopy", "Expand", "Alias", "Stack", "Cat", "Flip", "Neg"),
)
_OF_SCORES = (*_SHAPED, "Sum", "Mul", "Div", "Add", "Sub", "Exp", "Clamp")
"""What leads from the log-probability of an action to the factor of an advantage, also of a ratio; one live argument"""
_OF_STEPS = ("Stack", "Cat", "Add")
"""What joins those of the steps of an episode, or of the parts of an action."""
_OF_ADVANTAGES = (*_SHAPED, "Mul", "Div", "Add", "Sub")
"""What leads from a difference to an advantage: discounted sums, and a normalisation"""
_MOST = 256
"""Nodes on the way that are looked at."""
_KEPT = 2000


@dataclass(frozen=True, slots=True)
class _Product:
    """A log-probability times an advantage that has a graph."""

    side: int
    """which of the two factors is the advantage"""
    names: tuple[str, ...]
    """the parameters that only the advantage depends on"""
    ids: frozenset[int]
    site: Site | None
    made: Site | None
    """the line of the difference"""


class PolicyTrainsBaseline(CallCheck):
    """The advantage in a policy gradient was not detached: the actor's part of the loss trains the critic.

    ## What it does
    Follows the log-probabilities of actions, of `torch.distributions` and of drawn indices, to products with a
    difference of tensors that has a gradient path to parameters of its own, and tells where the same loss reaches these
    parameters without the product too, by a value loss. Where the critic is trained by a backward pass of its own,
    nothing is said. Cost: none beyond the tape of calls; a walk over the loss where such a product was seen.

    ## Why it is bad
    The derivative of `-log_prob * (returns - value)` in the value is the log-probability: the critic is pushed to make
    likely actions look good, against what its own loss asks for.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            policy = torch.distributions.Categorical(logits=self.model[0](batch))
            action, value = policy.sample(), self.model[1](batch).squeeze(1)
            advantage = batch[:, 0] * action - value
            return -(policy.log_prob(action) * advantage).mean() + advantage.square().mean()

    model = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 1)])
    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=model, data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            policy = torch.distributions.Categorical(logits=self.model[0](batch))
            action, value = policy.sample(), self.model[1](batch).squeeze(1)
            advantage = batch[:, 0] * action - value
            return -(policy.log_prob(action) * advantage.detach()).mean() + advantage.square().mean()

    model = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 1)])
    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=model, data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Write `advantage.detach()` in the policy's part of the loss, or compute the values under `torch.no_grad()` there.

    ## Source
    https://github.com/astariul/encode-attend-navigate-pytorch/issues/2; Sutton & Barto, "Reinforcement Learning", 2nd
    edition, section 13.4.
    """

    code = "SL462"
    title = "policy loss trains the baseline"
    severity = "warning"
    hears = _SUBTRACTIONS | _CHOICES | _LAST | _PRODUCTS | _DRAWS

    def __init__(self) -> None:
        self._scores: set[int] = set()
        """the nodes of log-probabilities of actions"""
        self._differences: dict[int, Site | None] = {}
        """the nodes of differences of two tensors"""
        self._products: dict[int, _Product] = {}
        self._told: set[str] = set()

    def hear(self, call: Call) -> Iterator[Fault]:
        """Note log-probabilities, differences, and products of the two."""
        out = call.out
        if call.name in _DRAWS and isinstance(out, Tensor):
            call.tape.mark(out, Mark(_DRAWN, call.name, "", call.site, call.tape.module, 0))
        if not isinstance(out, Tensor) or out.grad_fn is None:
            return iter(())
        if len(self._scores) + len(self._differences) > _KEPT:
            self._scores.clear()
            self._differences.clear()
        number = number_of(out.grad_fn)
        if is_in_log_prob(call) or (call.name in _CHOICES and _is_of_draws(call)):
            self._scores.add(number)
        elif call.name in _SUBTRACTIONS and _is_of_two(call):
            self._differences[number] = call.site
        elif call.name in _PRODUCTS and self._scores and self._differences and len(call.tensors) == 2:
            self._multiplied(call, number)
        return iter(())

    def _multiplied(self, call: Call, number: int) -> None:
        for side, (advantage, score) in enumerate((call.tensors, call.tensors[::-1])):
            own = call.tape.live(advantage) & ~call.tape.live(score)
            if not own or not _is_of_scores(self._scores, score):
                continue
            made = _led_to(self._differences, advantage, _OF_ADVANTAGES)
            if made is not None:
                ids = frozenset(id(p) for p in call.tape.parameters if call.tape.live(p) & own)
                names = tuple(call.tape.names_of(own))
                self._products[number] = _Product(side, names, ids, call.site, self._differences[made])

    def summed(self, roots: Iterable[Tensor]) -> Iterator[Fault]:
        """The faults of losses that are about to be differentiated together."""
        if not self._products:
            return
        met, reached = _without(roots, {number: product.side for number, product in self._products.items()})
        for number in met:
            product = self._products.pop(number)
            place = at(product.site, "the loss")
            if product.ids & reached and place not in self._told:
                self._told.add(place)
                yield self.fault(
                    "the advantage that weighs a log-probability has a gradient path to "
                    f"{listed(product.names)}, which another part of the same loss trains",
                    where=f"{place}; the advantage: {at(product.made, 'a difference')}",
                    why="the policy's part of the loss trains the critic too: it pushes the values of likely actions, "
                    "against what the critic's own loss asks for",
                    fix="detach it there: `log_prob * advantage.detach()`",
                    names=product.names,
                )
        if len(self._products) > _KEPT:
            self._products.clear()


def _is_of_draws(call: Call) -> bool:
    """Whether an index or a target descends from a draw."""
    return any(mark.kind == _DRAWN for tensor in call.tensors[1:] for mark in call.tape.marks_of(tensor))


def _is_of_two(call: Call) -> bool:
    """Whether one tensor is subtracted from another, none of which is one number repeated, as in `1 - x`."""
    if len(call.tensors) != 2:
        return False
    fixed = [t for t in call.tensors if not t.requires_grad and t.numel() > 1]
    return all(bool(t.min() != t.max()) for t in fixed if t.is_floating_point())


def _led_to(ends: Container[int], tensor: Tensor, kinds: Container[str]) -> int | None:
    """The end that nodes of some kinds lead to from a tensor."""
    waiting: list[Any] = [tensor.grad_fn]
    seen: set[Any] = set()
    while waiting and len(seen) < _MOST:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        number = number_of(node)
        if number in ends:
            return number
        if _kind(node) in kinds:
            waiting += _ways(node)
    return None


def _is_of_scores(scores: Container[int], tensor: Tensor) -> bool:
    """Whether a tensor is made of log-probabilities and constants alone; the steps of an episode may be added up."""
    waiting: list[Any] = [tensor.grad_fn]
    seen: set[Any] = set()
    while waiting and len(seen) < _MOST:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node is None:
            return False
        if number_of(node) in scores:
            continue
        ways, kind = _ways(node), _kind(node)
        if kind not in _OF_SCORES or not (len(ways) == 1 or kind in _OF_STEPS):
            return False
        waiting += ways
    return not waiting


def _kind(node: Any) -> str:
    name: str = node.name()
    return name.partition("Backward")[0]


def _ways(node: Any) -> list[Any]:
    return [way for way, _ in node.next_functions if way is not None]


def _without(roots: Iterable[Tensor], sides: dict[int, int]) -> tuple[list[int], set[int]]:
    """Which products some losses contain, and the ids of the leaves that they reach without those factors."""
    waiting: list[Any] = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen: set[Any] = set(waiting)
    met: list[int] = []
    reached: set[int] = set()
    while waiting:
        node = waiting.pop()
        variable = getattr(node, "variable", None)
        if variable is not None:
            reached.add(id(variable))
            continue
        number = number_of(node)
        side = sides.get(number)
        met += [] if side is None else [number]
        for place, (way, _) in enumerate(node.next_functions):
            if way is not None and way not in seen and place != side:
                seen.add(way)
                waiting.append(way)
    return met, reached
