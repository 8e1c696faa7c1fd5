"""Parameters that get gradients while no optimizer holds them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from safeloop.autograd.sites import Site
from safeloop.checks.check import EventCheck
from safeloop.checks.events import Backward, Event, Iteration, LoopState, Update
from safeloop.checks.process import held_by_any_optimizer
from safeloop.checks.setup.optimizers import StaleOptimizer, are_copies
from safeloop.checks.setup.ownership import UnownedParameter
from safeloop.checks.source import at
from safeloop.checks.wording import listed
from safeloop.faults import Fault

_ENOUGH = 2
"""Iterations with a gradient, after which nobody else can be about to update the parameter."""


@dataclass(slots=True)
class _Reached:
    tensor: Tensor
    site: Site | None
    iteration: int
    version: int
    value: Tensor
    iterations: set[int] = field(default_factory=set)

    def has_moved(self) -> bool:
        """Whether somebody has updated it by hand."""
        return self.tensor._version != self.version or not bool((self.tensor.detach() == self.value).all())


class GradientsForNobody(EventCheck):
    """A parameter that was replaced, added or unfrozen in the middle of the loop gets gradients, and has no optimizer.

    ## What it does
    Looks, at each backward pass, for parameters of the model that no optimizer of the process holds, and speaks at the
    end of the second iteration in which they got a gradient. Those that were there and trainable from the start are
    SL201. Parameters that the loop updates by hand do not count.

    ## Why it is bad
    An optimizer holds the tensors that it was given. `layer.weight = nn.Parameter(...)`, a new head, or a load with
    `assign=True` leave it with the old ones: it goes on to update tensors that the model does not use any more, and
    the new ones keep their values. What was frozen when the optimizer was built from the trainable parameters is not
    in it after `requires_grad_(True)` either.

    ## Bad
    ```python
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for epoch in range(2):
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.randn(8, 4)).square().mean().backward()
                optimizer.step()
                audit.step()
            model[0].weight = nn.Parameter(model[0].weight.detach().clamp(-0.1, 0.1))
    ```
    ## Good
    ```python
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.audit(model=model, optimizers=optimizer, on_fault="collect") as audit:
        for epoch in range(2):
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.randn(8, 4)).square().mean().backward()
                optimizer.step()
                audit.step()
            with torch.no_grad():
                model[0].weight.clamp_(-0.1, 0.1)
    ```
    ## Fix
    Write new values into the parameter that is there, under `torch.no_grad()`. Where a layer really is new, or was
    unfrozen, hand its parameters to the optimizer: `optimizer.add_param_group({"params": layer.parameters()})`.

    ## Source
    https://github.com/meta-pytorch/opacus/issues/432; documentation of `torch.optim.Optimizer.add_param_group`.
    """

    code = "SL214"
    title = "gradients for a parameter without an optimizer"

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._first = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
        self._reached: dict[str, _Reached] = {}
        self._ever: set[str] = set()
        self._told: set[str] = set()
        self._updates: Counter[str] = Counter()

    def see(self, event: Event, state: LoopState) -> Iterator[Fault]:
        """At the end of an iteration, of what two of them have reached."""
        if isinstance(event, Update):
            self._updates[event.owner] += not event.was_skipped
        elif isinstance(event, Backward):
            self._ever |= event.reached
            if state.optimizers:
                self._note(event, state)
        elif isinstance(event, Iteration) and self._reached:
            yield from self._tell(state, _ENOUGH)

    def close(self, state: LoopState) -> Iterator[Fault]:
        """Where the watch ends before the second iteration."""
        if self._reached:
            yield from self._tell(state, 1)

    def _note(self, event: Backward, state: LoopState) -> None:
        loose = event.reached - state.owner_of.keys()
        if not loose and not state.strangers:
            return
        ids = {id(stranger.tensor) for stranger in state.strangers}
        for name, parameter in self._model.named_parameters():
            if name in self._told or not (name in loose or id(parameter) in ids):
                continue
            found = self._reached.get(name)
            if found is None or found.tensor is not parameter:
                value = parameter.detach().clone()
                found = _Reached(parameter, event.site, event.iteration, parameter._version, value)
                self._reached[name] = found
            found.iterations.add(event.iteration)

    def _tell(self, state: LoopState, enough: int) -> Iterator[Fault]:
        ready = {name: found for name, found in self._reached.items() if len(found.iterations) >= enough}
        if not ready:
            return
        mine = {id(p) for optimizer in state.optimizers.values() for g in optimizer.param_groups for p in g["params"]}
        held = held_by_any_optimizer([found.tensor for found in ready.values()]) | mine
        loose = {n: f for n, f in ready.items() if id(f.tensor) not in held and not f.has_moved()}
        for name in ready:
            del self._reached[name]
        self._told |= ready.keys()
        if not loose:
            return
        loose = {n: f for n, f in loose.items() if self._is_at_work(n)}
        first = [name for name, f in loose.items() if self._was_trainable(name, f.tensor)]
        if first:
            yield from self._from_the_start(first, state)
        later = {name: found for name, found in loose.items() if name not in first}
        for kind in dict.fromkeys(self._kind(name, found.tensor, state) for name, found in later.items()):
            yield self._later(kind, {n: f for n, f in later.items() if self._kind(n, f.tensor, state) == kind}, state)

    def _is_at_work(self, name: str) -> bool:
        """Whether a parameter's module is not in eval mode beside others that train, as a fixed network is."""
        module = self._model.get_submodule(name.rpartition(".")[0])
        return module.training or not any(m.training and m._parameters for m in self._model.modules())

    def _was_trainable(self, name: str, tensor: Tensor) -> bool:
        known, trainable = self._first.get(name, (None, False))
        return known is tensor and trainable

    def _from_the_start(self, names: Sequence[str], state: LoopState) -> Iterator[Fault]:
        parameters = dict(self._model.named_parameters())
        known = {id(p) for p in parameters.values()}
        for owner, optimizer in state.optimizers.items():
            strange = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in known]
            if are_copies([parameters[n] for n in names], strange):
                return  # told on entry
            if strange and self._updates[owner] and not any(state.name_of.get(id(p)) in self._ever for p in strange):
                own = len(state.owners[owner]) - len(strange)
                yield StaleOptimizer.of(owner, strange, own, names, has_same_shapes=False)
        trainable = sum(p.requires_grad for p in parameters.values())
        yield UnownedParameter.in_a_loop(names, trainable, list(state.optimizers))

    def _kind(self, name: str, tensor: Tensor, state: LoopState) -> str:
        known, _ = self._first.get(name, (None, False))
        if known is tensor:
            return "thawed"
        return "replaced" if known is not None or name in state.owner_of else "added"

    @classmethod
    def replaced(cls, names: Sequence[str], owner: str, where: str) -> Fault:
        """The fault of parameters of an owner that other tensors have taken the place of."""
        what, why, fix = _TEXTS["replaced"]
        return cls.fault(
            f"{listed(names)}: {what}, in no optimizer", where=where, why=why.format(owner=owner), fix=fix, names=names
        )

    def _later(self, kind: str, found: Mapping[str, _Reached], state: LoopState) -> Fault:
        first = next(iter(found.values()))
        owner = next((state.owner_of[name] for name in found if name in state.owner_of), next(iter(state.owners)))
        what, why, fix = _TEXTS[kind]
        return self.fault(
            f"{listed(found)}: {what}, in no optimizer",
            where=f"since iteration {first.iteration}, {at(first.site, 'a backward pass')}",
            why=why.format(owner=owner),
            fix=fix,
            names=list(found),
        )


_TEXTS = {
    "replaced": (
        "replaced during training",
        "an optimizer holds the tensors that it was given: `{owner}` goes on to update the old one, which the model "
        "does not use any more, and the new one keeps its value",
        "write new values into the parameter that is there, `with torch.no_grad(): p.copy_(...)`; for a layer of "
        "another size, build the optimizer again or call its `add_param_group`",
    ),
    "thawed": (
        "frozen at first, trained now",
        "the optimizer was built from what was trainable then; `requires_grad_(True)` adds nothing to it",
        "call the optimizer's `add_param_group({'params': ...})` when you unfreeze them, or give it all parameters "
        "from the start: it leaves alone what has no gradient",
    ),
    "added": (
        "not in the model at first",
        "they get gradients, and nothing ever updates them",
        "create the layer before the optimizer, or call the optimizer's `add_param_group({'params': ...})`",
    ),
}
