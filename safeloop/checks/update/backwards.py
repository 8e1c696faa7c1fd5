"""A moving average that goes the wrong way round."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from safeloop.autograd.lineage import Mark
from safeloop.autograd.sites import Site
from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck, EventCheck
from safeloop.checks.events import Event, Iteration, LoopState
from safeloop.checks.source import at
from safeloop.checks.wording import listed
from safeloop.faults import Fault

_ENOUGH = 10
"""Iterations in which the copy was written into the original."""
_PRODUCTS = ("mul", "__mul__", "__rmul__", "multiply", "lerp", "_foreach_mul")
_WRITES = ("add_", "__iadd__", "lerp_", "copy_", ".data=", "_foreach_add_", "_foreach_lerp_", "_foreach_copy_")
_COPIES = ("copy_", "_foreach_copy_", ".data=")
_AVERAGES = frozenset(
    ("target", "targ", "tgt", "teacher", "ema", "momentum", "key", "k", "slow", "shadow", "avg", "average", "averaged")
)
"""Words for the copy that is to follow the other."""
_VALUE = "value of"


class AverageGoesBackwards(EventCheck, CallCheck):
    """The momentum update writes the target into the network that trains, and the target never changes.

    ## What it does
    Hears what is written, outside of the optimizer, into parameters that an optimizer trains, from parameters of the
    same shape that none holds. Speaks after 10 iterations in which this was more than a copy, if the others, by their
    name a `target`, `teacher`, `ema`, `momentum` or `key` network, have not changed meanwhile.
    Cost: none beyond the tape of calls.

    ## Why it is bad
    The average is to follow what trains. With the arguments exchanged it keeps its first values, and pulls the network
    that trains back to them at each step.

    ## Bad
    ```python
    online, target = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
    optimizer = torch.optim.SGD(online.parameters(), lr=0.01)
    with sl.audit(model={"online": online, "target": target}, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(12):
            x = torch.randn(8, 4)
            optimizer.zero_grad()
            (online(x) - target(x)).square().mean().backward()
            optimizer.step()
            with torch.no_grad():
                for p, q in zip(online.parameters(), target.parameters()):
                    p.mul_(0.99).add_(q, alpha=0.01)
            audit.step()
    ```
    ## Good
    ```python
    online, target = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
    optimizer = torch.optim.SGD(online.parameters(), lr=0.01)
    with sl.audit(model={"online": online, "target": target}, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(12):
            x = torch.randn(8, 4)
            optimizer.zero_grad()
            (online(x) - target(x)).square().mean().backward()
            optimizer.step()
            with torch.no_grad():
                for p, q in zip(online.parameters(), target.parameters()):
                    q.mul_(0.99).add_(p, alpha=0.01)
            audit.step()
    ```
    ## Fix
    Exchange the two: the target is written, from the online network.

    ## Source
    Grill et al., Bootstrap Your Own Latent (2020), and He et al., Momentum Contrast (2020), for the right direction.
    """

    code = "SL673"
    title = "average goes backwards"

    hears: ClassVar[frozenset[str]] = frozenset((*_PRODUCTS, *_WRITES))

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names: dict[int, str] = {}
        """what the parameters are and where they lie, of this iteration"""
        self._shapes: dict[str, torch.Size] = {}
        self._written: dict[tuple[str, str], Site | None] = {}
        """(parameter, the one that it was written from), of this iteration"""
        self._times: Counter[tuple[str, str]] = Counter()
        self._before: dict[str, tuple[Any, ...]] = {}
        self._was_told = False

    def hear(self, call: Call) -> Iterator[Fault]:
        """Note products of a parameter, and which parameter is written from which others."""
        if self._was_told or any(out.requires_grad and out.grad_fn is not None for out in _flat(call.out)):
            return iter(())
        first, rest = (call.args[0], call.args[1:]) if call.args else ((), ())
        if call.name in _PRODUCTS:
            for tensor in (*_flat(first), *(one for other in rest for one in _flat(other))):
                if name := self._name(tensor):
                    self._mark(call, name)
            return iter(())
        targets, sources = _flat(first), [_flat(one) for one in rest]
        for index, target in enumerate(targets):
            name = self._name(target)
            given = [group[index] for group in sources if len(group) == len(targets)] if name else []
            for source in {other for tensor in given for other in self._from(call, tensor)} - {name}:
                if self._shapes[source] == self._shapes[name]:
                    self._written[name, source] = call.site
        return iter(())

    def _mark(self, call: Call, name: str) -> None:
        for out in _flat(call.out):
            if out.shape == self._shapes[name]:
                call.tape.mark(out, Mark(_VALUE, name, "", call.site, call.tape.module, 0))

    def _from(self, call: Call, tensor: Tensor) -> set[str]:
        """The parameters that a tensor was computed from; the one that it is, unless it is a plain copy."""
        found = {mark.name for mark in call.tape.marks_of(tensor) if mark.kind == _VALUE}
        name = self._name(tensor)
        return found | {name} if name and call.name not in _COPIES else found

    def _name(self, tensor: Tensor) -> str:
        if not self._names:
            named = [(name, p) for name, p in self._model.named_parameters() if p.layout is torch.strided and p.numel()]
            self._names = {id(p): name for name, p in named}  # `p.data = ...` moves it
            self._names |= {_pointer(p): name for name, p in named if _pointer(p)}
            self._shapes = {name: p.shape for name, p in named}
        name = self._names.get(id(tensor)) or self._names.get(_pointer(tensor), "")
        return name if name and self._shapes[name] == tensor.shape else ""

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the end of the tenth iteration of this kind."""
        if not isinstance(event, Iteration):
            return
        written, self._written, self._names = self._written, {}, {}
        pairs = [
            (name, source)
            for name, source in written
            if name in state.owner_of and source not in state.owner_of and _AVERAGES & set(re.split(r"[._]", source))
        ]
        if not pairs or self._was_told:
            return
        parameters = dict(self._model.named_parameters())
        self._times.update(pairs)
        still = []
        for name, source in pairs:
            value = _value_of(parameters[source])
            if self._before.setdefault(source, value) != value:
                self._was_told = True  # it moves: whatever this is, it is not that
                return
            if self._times[name, source] >= _ENOUGH:
                still.append((name, source))
        if still:
            self._was_told = True
            yield self._fault_of(still, written[still[0]])

    def _fault_of(self, pairs: list[tuple[str, str]], site: Site | None) -> Fault:
        names, sources = [name for name, _ in pairs], [source for _, source in pairs]
        return self.fault(
            f"in {_ENOUGH} iterations {listed(names)} were written from {listed(sources)}, which have not changed "
            "meanwhile",
            where=at(site, "a moving average"),
            why="the average goes the wrong way: what follows by its name keeps its first values, and what trains is "
            "pulled back to them after each step",
            fix="exchange the two: `target.lerp_(online, 1 - momentum)`",
            names=[*names, *sources],
        )


def _value_of(parameter: nn.Parameter) -> tuple[Any, ...]:
    """What differs once a parameter has changed; reads the device."""
    values = parameter.detach().double()
    return float(values.sum()), float(values.norm())


def _pointer(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # sparse, or inside a transform of torch.func
        return 0


def _flat(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for t in value if isinstance(t, Tensor)] if isinstance(value, (list, tuple)) else []
