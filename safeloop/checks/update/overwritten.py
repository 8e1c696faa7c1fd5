"""Parameters that an optimizer trains and that are copied over from others."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck, EventCheck
from safeloop.checks.events import Event, Iteration, LoopState, Update
from safeloop.checks.source import at
from safeloop.checks.wording import listed
from safeloop.faults import Fault


class TrainedAndOverwritten(CallCheck, EventCheck):
    """A target network is trained by the optimizer of the network that it is a copy of.

    ## What it does
    Hears copies and moving averages from one parameter into another (`copy_`, `lerp_`, `add_`, and what
    `load_state_dict` does) on the steps that are looked at in depth. Tells where the optimizer steps, with a gradient
    of one loss for both, on parameters that were written from others of its own in two iterations. Cost: none beyond
    the tape of calls.

    ## Why it is bad
    The target is to stand still between two copies. Where its gradient is not cut and its parameters are in the
    optimizer, the loss is lowered by moving the target to the prediction; the next copy throws these steps away.

    ## Bad
    ```python
    net, target = nn.Linear(4, 2), nn.Linear(4, 2)
    models = {"net": net, "target": target}
    optimizer = torch.optim.SGD([*net.parameters(), *target.parameters()], lr=0.01)
    with sl.audit(model=models, optimizers=optimizer, on_fault="collect") as audit:
        for i in range(8):
            optimizer.zero_grad()
            (net(torch.randn(8, 4)) - target(torch.randn(8, 4))).square().mean().backward()
            optimizer.step()
            if i % 3 == 2:
                target.load_state_dict(net.state_dict())
            audit.step()
    ```
    ## Good
    ```python
    net, target = nn.Linear(4, 2), nn.Linear(4, 2).requires_grad_(False)
    models = {"net": net, "target": target}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    with sl.audit(model=models, optimizers=optimizer, on_fault="collect") as audit:
        for i in range(8):
            optimizer.zero_grad()
            (net(torch.randn(8, 4)) - target(torch.randn(8, 4))).square().mean().backward()
            optimizer.step()
            if i % 3 == 2:
                target.load_state_dict(net.state_dict())
            audit.step()
    ```
    ## Fix
    Give the optimizer the parameters of the trained network alone, freeze the copy by `requires_grad_(False)`, or
    compute its values under `torch.no_grad()`.

    ## Source
    https://github.com/philtabor/Deep-Q-Learning-Paper-To-Code/issues/9.
    """

    code = "SL662"
    title = "trained and overwritten"
    hears = frozenset(
        ("copy_", "lerp_", "add_", "__iadd__", "_foreach_copy_", "_foreach_lerp_", "_foreach_add_", "_foreach_lerp")
    )

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names: dict[int, str] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._written: dict[str, set[str]] = {}
        """parameter -> those that it was written from, of this iteration"""
        self._times: dict[str, int] = {}
        self._sources: dict[str, set[str]] = {}
        self._was_told = False

    def hear(self, call: Call) -> Iterator[Fault]:
        """Note which parameter is written from which others."""
        if self._was_told:
            return iter(())
        first, rest = (call.args[0], call.args[1:]) if call.args else ((), ())
        targets, sources = _flat(first), [_flat(one) for one in rest]
        for index, target in enumerate(targets):
            name = self._name(target)
            given = [group[index] for group in sources if len(group) == len(targets)]
            found = {other for tensor in given for other in self._from(call, tensor)} if name else set()
            found = {other for other in found - {name} if self._shapes[other] == self._shapes[name]}
            if found:
                self._written.setdefault(name, set()).update(found)
        return iter(())

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At a step on parameters that were written in two iterations."""
        if isinstance(event, Iteration):
            for name, sources in self._written.items():
                self._times[name] = self._times.get(name, 0) + 1
                self._sources.setdefault(name, set()).update(sources)
            self._written.clear()
        if not isinstance(event, Update) or not event.is_deep or self._was_told:
            return
        owned = state.owners[event.owner]
        held = {name: {p.number for p in one.passes} for name, one in state.held.items()}
        idle = event.absent | event.zero
        names = [
            name
            for name, times in sorted(self._times.items())
            if times > 1 and name in owned and name not in idle and self._is_shared(name, owned, held)
        ]
        if names:
            self._was_told = True
            yield self._fault_of(names, event)

    def _fault_of(self, names: list[str], event: Update) -> Fault:
        sources = sorted({source for name in names for source in self._sources[name]})
        return self.fault(
            f"copies are trained: {listed(names)}, written from {listed(sources)} again and again, and stepped by "
            f"`{event.owner}` in between",
            where=at(event.site, f"step() of `{event.owner}`"),
            why="a copy that serves as a target is to stand still; here the loss also moves it towards the "
            "prediction, and the next copy throws that away",
            fix="leave these parameters out of the optimizer and freeze them by `requires_grad_(False)`, or compute "
            "what they give under torch.no_grad()",
            names=names,
        )

    def _is_shared(self, name: str, owned: frozenset[str], held: dict[str, set[int]]) -> bool:
        """Whether one pass gives a gradient to a parameter and to one that it is written from."""
        mine = held.get(name, set())
        return any(source in owned and mine & held.get(source, set()) for source in self._sources[name])

    def _name(self, tensor: Tensor) -> str:
        if not self._names:
            self._names = {p.data_ptr(): name for name, p in self._model.named_parameters() if _is_plain(p)}
            self._shapes = {name: p.shape for name, p in self._model.named_parameters()}
        try:
            return self._names.get(tensor.data_ptr(), "")
        except RuntimeError:  # sparse, or inside a transform of torch.func: there is no memory to compare
            return ""

    def _from(self, call: Call, tensor: Tensor) -> set[str]:
        """The parameters whose value a tensor is, or was computed from without a graph."""
        cuts = [mark for mark in call.tape.marks_of(tensor) if mark.kind == "cut"]
        found = {name for mark in cuts for name in call.tape.names_of(mark.live)}
        return found | {name for name in [self._name(tensor)] if name}


def _is_plain(parameter: nn.Parameter) -> bool:
    return parameter.layout is torch.strided and type(parameter) is nn.Parameter and parameter.numel() > 0


def _flat(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for t in value if isinstance(t, Tensor)] if isinstance(value, (list, tuple)) else []
