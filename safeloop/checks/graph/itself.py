"""Weights that are mixed with, or loaded from, a copy that is no copy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import ClassVar

from torch import Tensor, nn

from safeloop.autograd.sites import Site
from safeloop.autograd.tape import Call
from safeloop.autograd.writes import storage_pointer
from safeloop.checks.check import CallCheck
from safeloop.checks.source import at
from safeloop.checks.wording import listed
from safeloop.faults import Fault

_SCALES = ("mul_", "__imul__", "_foreach_mul_")
_ADDS = ("add_", "_foreach_add_")
_LERPS = ("lerp_", "_foreach_lerp_")
_LOADS = ("copy_",)


class CopyOfItself(CallCheck):
    """An average or a saved state of the weights lies in the same memory as the weights.

    ## What it does
    Listens for in-place operations that mix a weight with itself, or copy it onto itself, on the steps that are looked
    at in depth. Speaks at the second mix on a line, and when a load has copied every weight of the model onto itself.

    ## Why it is bad
    `model.state_dict()` returns the weights themselves, not copies. An average kept in it writes into the weights that
    train: `shadow.mul_(0.99).add_(weight, alpha=0.01)` shrinks them on every step. A "best" state kept so is always the
    latest one, and loading it does nothing.

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
    Copy: `copy.deepcopy(model.state_dict())`, or `.clone()` each value.

    ## Source
    https://github.com/thunlp/OpenKE/pull/131; https://github.com/zhangj111/astnn/issues/8.
    """

    code = "SL318"
    title = "copy of the weights is the weights"
    severity = "warning"
    hears: ClassVar[frozenset[str]] = frozenset((*_SCALES, *_ADDS, *_LERPS, *_LOADS))

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names: dict[int, str] = {}
        self._scaled: tuple[int, float] = (0, 0.0)
        """what was multiplied last, and by what"""
        self._times: Counter[Site | None] = Counter()
        self._loaded: dict[Site | None, set[str]] = {}
        self._told: set[Site | None] = set()

    def hear(self, call: Call) -> Iterator[Fault]:
        """At the second mix on a line, or the load of the last weight."""
        if call.name in _SCALES:
            self._scaled = _first_pointer(call.args[0]), _number(call.args[1] if len(call.args) > 1 else None)
            return
        if len(call.args) < 2 or not (pairs := list(_same(call.args[0], call.args[1]))):
            return
        if call.name in _ADDS and not self._is_average(call):
            return  # a decay by hand, `w.add_(w, alpha=-decay)`
        self._names = {storage_pointer(p): name for name, p in self._model.named_parameters()}
        names = [self._names[storage_pointer(tensor)] for tensor in pairs if storage_pointer(tensor) in self._names]
        if not names or call.site in self._told:
            return
        if call.name in _LOADS:
            loaded = self._loaded.setdefault(call.site, set())
            loaded.update(names)
            if len(self._names) > 1 and loaded >= set(self._names.values()):
                self._told.add(call.site)
                yield self._load(call.site, sorted(loaded))
            return
        self._times[call.site] += 1
        if self._times[call.site] == 2:
            self._told.add(call.site)
            yield self.fault(
                f"{listed(names)} is mixed with itself: what is updated here shares its memory with the weight",
                where=at(call.site, "an update in place"),
                why="`state_dict()` and `.data` give the weights themselves, not copies: the average writes into the "
                "weights that train, and changes them on every step",
                fix="begin with copies: `copy.deepcopy(model.state_dict())`, or `.clone()` each value",
                names=names,
            )

    def _is_average(self, call: Call) -> bool:
        """Whether the weights of a product before and of this sum make one."""
        pointer, factor = self._scaled
        alpha = _number(call.kwargs.get("alpha", 1))
        return pointer == _first_pointer(call.args[0]) and abs(factor + alpha - 1) < 1e-6

    def _load(self, site: Site | None, names: list[str]) -> Fault:
        return self.fault(
            f"a state was loaded into the model whose values are the weights themselves: {listed(names)}",
            where=at(site, "load_state_dict"),
            why="`state_dict()` gives the weights, not copies: a state that was kept from before (the best one) has "
            "changed with every step since, and loading it does nothing",
            fix="keep a copy: `copy.deepcopy(model.state_dict())`, or `.clone()` each value",
            names=names,
        )


def _same(first: object, second: object) -> Iterator[Tensor]:
    """The tensors of the first argument that the second one has in the same place of memory."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        pairs: list[tuple[object, object]] = [(first, second)]
    elif isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        pairs = list(zip(first, second, strict=False))
    else:
        return
    for one, other in pairs:
        if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one is other:
            continue
        pointer = storage_pointer(one) if one.shape == other.shape else 0
        if pointer and pointer == storage_pointer(other) and one.storage_offset() == other.storage_offset():
            yield one


def _first_pointer(value: object) -> int:
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    return storage_pointer(first) if isinstance(first, Tensor) else 0


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")
