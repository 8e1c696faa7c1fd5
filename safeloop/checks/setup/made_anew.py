"""Layers that a forward makes anew each time it runs."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from safeloop.autograd.sites import Site
from safeloop.autograd.tape import Call, Tape
from safeloop.checks.check import CallCheck
from safeloop.checks.process import held_by_any_optimizer
from safeloop.checks.source import at
from safeloop.faults import Fault

_ENOUGH = 3
"""Layers on one line, of which the last one alone is still there."""
_MOST = 100
"""Layers of one line that are looked at"""


class LayerMadeInForward(CallCheck):
    """A forward makes a layer, uses it once, and forgets it.

    ## What it does
    Looks at layers of `torch.nn` with random weights that run inside of a module of the model without being a part of
    it. Speaks where one line has run a third one, those before are gone, and no optimizer holds it. Layers that are
    kept, even in a plain list, are other faults; normalisation, which begins as the identity, is left alone. Cost: none
    beyond the tape of calls.

    ## Why it is bad
    Each forward begins with new random weights. They get a gradient, and are thrown away with it: the layer is noise
    that is never trained, differs from call to call, and is not in the `state_dict`.

    ## Bad
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 8)

        def forward(self, x):
            return nn.Linear(8, 1)(self.body(x).relu())

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            audit.step()
    ```
    ## Good
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 1)

        def forward(self, x):
            return self.head(self.body(x).relu())

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            audit.step()
    ```
    ## Fix
    Make the layer in `__init__` and keep it as an attribute; where its size is known only later, use a lazy layer
    (`nn.LazyLinear`).

    ## Source
    https://github.com/graykode/nlp-tutorial/issues/29.
    """

    code = "SL220"
    title = "layer made in forward"
    hears = frozenset(
        (
            *("linear", "bilinear", "embedding", "embedding_bag", "conv1d", "conv2d", "conv3d"),
            *("conv_transpose1d", "conv_transpose2d", "lstm", "gru", "rnn_tanh", "multi_head_attention_forward"),
        )
    )

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._step = -1
        self._ours: set[int] = set()
        self._made: dict[Site, list[Any]] = {}
        """line -> weak references to the layers that it has run"""
        self._copies: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        """layers that began as copies of a layer of the model, as fast weights do"""
        self._told: set[Site] = set()

    def hear(self, call: Call) -> Iterator[Fault]:
        """At the third layer of a line."""
        tape = call.tape
        if tape.first_node != self._step:
            self._step = tape.first_node
            self._ours = {id(module) for module in self._model.modules()}
        layer, around = tape.running, self._around(tape)
        if layer is None or around is None or call.site is None or not call.grad_mode:
            return
        trainable = [p for p in layer.parameters() if p.requires_grad and p.is_leaf]
        if not trainable or call.site in self._told:
            return
        made = self._made.setdefault(call.site, [])
        if layer in self._copies or len(made) >= _MOST or any(one() is layer for one in made):
            return
        if self._is_copy(trainable[0]):
            self._copies.add(layer)
            return
        made.append(weakref.ref(layer))
        if sum(one() is None for one in made) >= _ENOUGH - 1:
            self._told.add(call.site)
            if not held_by_any_optimizer(trainable):
                yield self._fault_of(layer, around, tape.path_of(around), call.site)

    def _is_copy(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter of the model has the same values; reads the device."""
        return any(p.shape == parameter.shape and torch.equal(p, parameter) for p in self._model.parameters())

    def _around(self, tape: Tape) -> nn.Module | None:
        """The module of the model whose forward runs a layer of torch's that is no part of it; None in other cases."""
        for module in tape.all_running:
            if id(module) in self._ours:
                return None if module is tape.running else module
            if not type(module).__module__.startswith("torch.nn."):
                return None
        return None

    def _fault_of(self, layer: nn.Module, around: nn.Module, path: str, site: Site) -> Fault:
        kind = type(layer).__name__
        return self.fault(
            f"the forward of `{path}` ({type(around).__name__}) has run {_ENOUGH} different {kind} layers on one line: "
            "it makes a new one, with new random weights, each time",
            where=at(site, f"forward of `{path}`"),
            why="its weights are in no optimizer and in no state_dict, and are gone after the call: the layer never "
            "trains",
            fix=f"make the {kind} in `__init__` of {type(around).__name__} and keep it as an attribute",
            names=(path,),
        )
