"""Weights that are mixed with, or loaded from, a copy that is no copy."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from typing import ClassVar
from weakref import ref

from torch import Tensor, nn

from safeloop.autograd.opnames import writes_to
from safeloop.autograd.sites import Site
from safeloop.autograd.tape import Call
from safeloop.autograd.writes import storage_pointer
from safeloop.checks.check import CallCheck
from safeloop.checks.source import at
from safeloop.checks.wording import listed
from safeloop.faults import Fault

_SCALES = ("mul_", "__imul__", "_foreach_mul_")
_ADDS = ("add_", "_foreach_add_")
_LERPS = ("lerp_", "_foreach_lerp_", "lerp")
_LOADS = ("copy_",)
_PRODUCTS = ("mul", "__mul__", "__rmul__", "multiply")
_SUMS = ("add", "__add__", "__radd__")
_EXACT = 1e-6
_KEPT = 8
"""Products that are remembered: the two that an average adds."""

_Place = tuple[int, int, tuple[int, ...]]


class CopyOfItself(CallCheck):
    """An average or a saved state of the weights lies in the same memory as the weights.

    ## What it does
    Listens for averages that mix a weight with itself, and for copies of it onto itself, on the steps that are looked
    at in depth. Speaks at the second mix of a weight, when a load has copied every weight of the model onto itself, and
    when a line that copies nothing else does so to some of them for the second time.

    ## Why it is bad
    `model.state_dict()` returns the weights themselves, not copies. An average kept in it writes into the weights that
    train: `shadow.mul_(0.99).add_(weight, alpha=0.01)` shrinks them on every step. A "best" state kept so is always the
    latest one, and loading it does nothing. A target network that is the trained one has nothing to follow; one that
    loads its own state stays what it was at first.

    ## Bad
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    shadow = model.state_dict()
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    shadow[name].mul_(0.99).add_(weight, alpha=0.01)
            audit.step()
    ```
    ## Good
    ```python
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    shadow = {name: value.clone() for name, value in model.state_dict().items()}
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    shadow[name].mul_(0.99).add_(weight, alpha=0.01)
            audit.step()
    ```
    ## Fix
    Copy: `copy.deepcopy(model.state_dict())`, or `.clone()` each value. Load a target from the network that it follows:
    `target.load_state_dict(online.state_dict())`.

    ## Source
    https://github.com/thunlp/OpenKE/pull/131; https://github.com/zhangj111/astnn/issues/8;
    https://github.com/thesouther/MARL/issues/8.
    """

    code = "SL318"
    title = "copy of the weights is the weights"
    severity = "warning"
    hears: ClassVar[frozenset[str]] = frozenset((*_SCALES, *_ADDS, *_LERPS, *_LOADS, *_PRODUCTS, *_SUMS))

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names: dict[int, str] = {}
        self._scaled: tuple[int, float] = (0, 0.0)
        """what was multiplied last, and by what"""
        self._products: deque[tuple[ref[Tensor], _Place, float]] = deque(maxlen=_KEPT)
        """results of `factor * tensor`, with the place of the tensor"""
        self._times: Counter[tuple[Site | None, str]] = Counter()
        self._loads: dict[Site | None, Counter[str]] = {}
        self._copying: set[Site | None] = set()
        """lines that copy other values too"""
        self._told: set[Site | None] = set()

    def hear(self, call: Call) -> Iterator[Fault]:
        """At the second mix of a weight, or the load of the last one."""
        if call.name in _PRODUCTS:
            self._multiplied(call)
        elif call.name in _SCALES:
            self._scaled = _first_pointer(call.args[0]), _number(call.args[1] if len(call.args) > 1 else None)
        elif call.name in _LOADS:
            yield from self._copied(call)
        elif places := self._mixed(call):
            yield from self._mix(call, places)

    def _multiplied(self, call: Call) -> None:
        out, tensors = call.out, call.tensors
        if len(tensors) != 1 or len(call.args) != 2 or not isinstance(out, Tensor) or out.requires_grad:
            return
        factor = _number(call.args[0] if tensors[0] is call.args[1] else call.args[1])
        self._products.append((ref(out), _place(tensors[0]), factor))

    def _mixed(self, call: Call) -> list[int]:
        """Where the tensors lie that an average mixes with themselves."""
        if len(call.args) < 2:
            return []
        one, other = call.args[:2]
        if call.name in _LERPS:
            return list(_same(one, other))
        alpha = _number(call.kwargs.get("alpha", 1))
        product = self._product_of(other)
        if call.name in _SUMS:
            first = self._product_of(one)
            if first is None or product is None or first[0] != product[0]:
                return []
            return [first[0][0]] if abs(first[1] + alpha * product[1] - 1) < _EXACT else []
        pointer, share = self._scaled
        if pointer != _first_pointer(one):
            return []  # a decay by hand, `w.add_(w, alpha=-decay)`
        if product is not None:
            is_same = isinstance(one, Tensor) and product[0] == _place(one)
            return [pointer] if is_same and abs(share + alpha * product[1] - 1) < _EXACT else []
        return list(_same(one, other)) if abs(share + alpha - 1) < _EXACT else []

    def _product_of(self, value: object) -> tuple[_Place, float] | None:
        return next(((place, factor) for out, place, factor in self._products if out() is value), None)

    def _mix(self, call: Call, places: list[int]) -> Iterator[Fault]:
        names = self._known(places)
        if not names or call.site in self._told:
            return
        key = call.site, names[0]  # after a first `avg[k] = m * avg[k] + (1 - m) * w` what is kept is no weight
        self._times[key] += 1
        if self._times[key] == 2:
            self._told.add(call.site)
            yield self.fault(
                f"{listed(names)} is mixed with itself: what is updated here shares its memory with the weight",
                where=at(call.site, "an update"),
                why="`state_dict()` and `.data` give the weights themselves, not copies, and so does a second name for "
                "a network: the average is one of the weights that train with themselves",
                fix="begin with copies: `copy.deepcopy(model)` or `copy.deepcopy(model.state_dict())`, or `.clone()` "
                "each value",
                names=names,
            )

    def _known(self, places: list[int]) -> list[str]:
        self._names = {storage_pointer(p): name for name, p in self._model.named_parameters()}
        return [self._names[place] for place in places if place in self._names]

    def _copied(self, call: Call) -> Iterator[Fault]:
        site = call.site
        if len(call.args) < 2 or site in self._told:
            return
        pairs = list(_same(*call.args[:2]))
        if not pairs:
            self._copying.add(site)
            return
        if writes_to(call.tape.maker(call.args[1])):  # `p.copy_(p.clamp_(-1, 1))`
            return
        loads = self._loads.setdefault(site, Counter())
        loads.update(names := self._known(pairs))
        if len(self._names) > 1 and loads.keys() >= set(self._names.values()):
            self._told.add(site)
            yield self._load(site, sorted(loads))
        elif any(loads[name] > 1 for name in names) and site not in self._copying:
            self._told.add(site)
            yield self._own(site, list(loads))

    def _own(self, site: Site | None, names: list[str]) -> Fault:
        return self.fault(
            f"weights are copied onto themselves, again and again: {listed(names)}",
            where=at(site, "load_state_dict"),
            why="what is loaded here is the network's own state, not that of another: the copy changes nothing, and a "
            "target network stays what it was",
            fix="load the state of the network that it is to follow: `target.load_state_dict(online.state_dict())`; "
            "keep a state for later by `copy.deepcopy(model.state_dict())`",
            names=names,
        )

    def _load(self, site: Site | None, names: list[str]) -> Fault:
        return self.fault(
            f"a state was loaded into the model whose values are the weights themselves: {listed(names)}",
            where=at(site, "load_state_dict"),
            why="`state_dict()` gives the weights, not copies: a state that was kept from before (the best one) has "
            "changed with every step since, and loading it does nothing",
            fix="keep a copy: `copy.deepcopy(model.state_dict())`, or `.clone()` each value",
            names=names,
        )


def _same(first: object, second: object) -> Iterator[int]:
    """Where the tensors of the first argument lie that the second one has in the same place of memory."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        pairs: list[tuple[object, object]] = [(first, second)]
    elif isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        pairs = list(zip(first, second, strict=False))
    else:
        return
    for one, other in pairs:
        if isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape:
            place = _place(one)
            if place[0] and place == _place(other):
                yield place[0]


def _place(tensor: Tensor) -> _Place:
    """Where a tensor lies: its storage, and the part of it."""
    return storage_pointer(tensor), int(tensor.storage_offset()), tuple(tensor.shape)


def _first_pointer(value: object) -> int:
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    return storage_pointer(first) if isinstance(first, Tensor) else 0


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")
