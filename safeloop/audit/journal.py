"""The journal of a loop: turns calls on the tape, optimizer hooks and schedules into events, and tells the checks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import clip_grad

from safeloop.autograd.sites import Site
from safeloop.autograd.survey import Survey, survey
from safeloop.autograd.tape import Call, Listener, Mark
from safeloop.checks.events import (
    Backward,
    Clip,
    Event,
    GradientUse,
    Held,
    Iteration,
    LoopState,
    Unscale,
    Update,
    Zero,
)

_MOST = 400
"""Events that are remembered."""


_CLIPS = {"_clip_grads_with_norm_": "max_norm", "clip_grad_value_": "clip_value"}


class Journal:
    """Keeps the events of a loop and what `.grad` holds.

    Args:
        parameters: name -> parameter: those of the model, and what else the optimizers hold.
        owners: owner -> its optimizer.
        tell: is called with each event and the state from before it.
        surveyed: is called with each backward pass about to run and the walk over its graph.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        owners: Mapping[str, Any],
        tell: Callable[[Event, LoopState], None],
        surveyed: Callable[[Backward, list[Tensor], Survey, Call], None],
    ) -> None:
        self.iteration = 0
        self.since = 0
        """sequence number of the first node of this iteration"""
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._parameters = parameters
        self._numbers = itertools.count()
        owned = {
            owner: [self._names[id(p)] for group in optimizer.param_groups for p in group["params"]]
            for owner, optimizer in owners.items()
        }
        self.state = LoopState(
            owner_of={name: owner for owner, names in owned.items() for name in names},
            owners={owner: frozenset(names) for owner, names in owned.items()},
            optimizers=owners,
        )
        self._tell = tell
        self._surveyed = surveyed
        self._pending: tuple[Site | None, set[str]] | None = None

    @property
    def listeners(self) -> dict[str, list[Listener]]:
        """Which calls the journal wants to hear."""
        hear: dict[str, Listener] = {
            "backward": self._backward,
            ".grad=": self._grad_set,
            ".grad": self._grad_read,
            "zero_": self._zeroed,
            "_foreach_zero_": self._zeroed,
            "clamp": self._clipped,
            "clamp_": self._clipped,
            "_foreach_clamp_min_": self._clipped,
            "mul": self._scaled,
            "__mul__": self._scaled,
            "__rmul__": self._scaled,
            "multiply": self._scaled,
            "div": self._scaled,
            "__truediv__": self._scaled,
            "true_divide": self._scaled,
        }
        return {name: [listener] for name, listener in hear.items()}

    def open(self) -> None:
        """A stretch of steps begins in which everything is seen."""
        held = {name: Held() for name, p in self._parameters.items() if p.grad is None}
        self.state.held = held
        self.state.is_known = True

    def close(self) -> None:
        """The stretch is over: what `.grad` holds is no longer followed."""
        self._flush()
        self.state.held = {}
        self.state.is_known = False

    def record(self, event: Event) -> None:
        """Tell the checks of an event, then let it change the state."""
        if not isinstance(event, Zero):
            self._flush()
        self._tell(event, self.state)
        self._apply(event)
        for events in (self.state.order, self.state.recent):
            events.append(event)
        del self.state.recent[:-_MOST]
        if isinstance(event, Iteration):
            self.state.order.clear()

    def _apply(self, event: Event) -> None:
        state = self.state
        if isinstance(event, Backward):
            for name in event.reached:
                if name in state.held:
                    state.held[name].passes.append(event)
        elif isinstance(event, Zero):
            for name in event.parameters:
                if state.is_known:
                    state.held[name] = Held()
                if (owner := state.owner_of.get(name)) is not None:
                    state.unscaled.discard(owner)
        elif isinstance(event, GradientUse) and event.is_write:
            for name in event.parameters & state.held.keys():
                state.held[name].is_manual = True
        elif isinstance(event, Unscale):
            state.unscaled.add(event.owner)
        elif isinstance(event, Update):
            if not event.was_skipped:
                state.updates[event.owner] = state.updates.get(event.owner, 0) + 1
                state.last_update[event.owner] = event
            for name in state.owners[event.owner] & state.held.keys():
                state.held[name].used = len(state.held[name].passes)
            state.unscaled.discard(event.owner)

    def stepped(self, owner: str) -> None:
        """A step is over: the backward passes of its closure are used."""
        self._flush()
        self.state.inside = ""
        for name in self.state.owners[owner] & self.state.held.keys():
            self.state.held[name].used = len(self.state.held[name].passes)

    def _flush(self) -> None:
        if self._pending is not None:
            (site, names), self._pending = self._pending, None
            self.record(Zero(site, self.iteration, frozenset(names)))

    def _zero(self, site: Site | None, names: Iterable[str]) -> None:
        if self._pending is not None and self._pending[0] != site:
            self._flush()
        if self._pending is None:
            self._pending = (site, set())
        self._pending[1].update(names)

    def _backward(self, call: Call) -> None:
        first = call.args[0] if call.args else call.kwargs.get("tensors")
        roots = [first] if isinstance(first, Tensor) else [t for t in first or () if isinstance(t, Tensor)]
        self._flush()
        found = survey(*roots, since=self.since)
        only = call.kwargs.get("inputs")
        if only is not None:
            wanted = {id(t) for t in ([only] if isinstance(only, Tensor) else only)}
            found.leaves = {key: leaf for key, leaf in found.leaves.items() if key in wanted}
        names = frozenset(self._names[key] for key in found.leaves if key in self._names)
        marks = [mark for root in roots for mark in call.tape.marks_of(root)]
        event = Backward(
            call.site,
            self.iteration,
            next(self._numbers),
            names,
            found.is_complete,
            any(key not in self._names for key in found.leaves),
            is_scaled=any(mark.kind == "scaled" for mark in marks),
            factor=_factor(marks),
            makes_graph=bool(call.kwargs.get("create_graph")),
            root=roots[0].grad_fn._sequence_nr() if roots and roots[0].grad_fn is not None else -1,
            visited=frozenset(found.numbers),
            counts=tuple((mark.site, int(mark.name)) for mark in marks if mark.kind == "mean"),
        )
        self._surveyed(event, roots, found, call)
        self.record(event)

    def _grad_set(self, call: Call) -> None:
        name = self._names.get(id(call.args[0]))
        if name is None:
            return
        if call.args[1] is None:
            self._zero(call.site, [name])
        else:
            self.record(GradientUse(call.site, self.iteration, True, frozenset([name])))

    def _grad_read(self, call: Call) -> None:
        name = self._names.get(id(call.args[0]))
        if name is not None and call.is_direct and call.out is not None:
            last = self.state.recent[-1] if self.state.recent else None
            if not (isinstance(last, GradientUse) and last.site == call.site and name in last.parameters):
                self.record(GradientUse(call.site, self.iteration, False, frozenset([name])))

    def _zeroed(self, call: Call) -> None:
        first = call.args[0]
        written = {t.data_ptr() for t in ([first] if isinstance(first, Tensor) else first)}
        gradients = {p.grad.data_ptr(): n for n, p in self._parameters.items() if p.grad is not None}
        if names := [gradients[pointer] for pointer in written if pointer in gradients]:
            self._zero(call.site, names)

    def _clipped(self, call: Call) -> None:
        caller = call.caller
        if caller is None or caller.f_code.co_filename != clip_grad.__file__:
            return
        key = _CLIPS.get(caller.f_code.co_name)
        if key is None:
            return
        values = caller.f_locals
        given = values.get("parameters", ())
        tensors = [given] if isinstance(given, Tensor) else list(given) if isinstance(given, (list, tuple)) else []
        names = frozenset(self._names[id(t)] for t in tensors if id(t) in self._names)
        limit = float(values.get(key, float("inf")))
        self.record(Clip(call.site, self.iteration, caller.f_code.co_name, limit, names))

    def _scaled(self, call: Call) -> None:
        out = call.out
        if not isinstance(out, Tensor) or out.dim() or len(call.args) < 2:
            return
        caller = call.caller
        if caller is not None and caller.f_code.co_filename.endswith("grad_scaler.py"):
            call.tape.mark(out, _mark("scaled", call.name, call))
            return
        other = call.args[1]
        if isinstance(other, (int, float)):
            factor = float(other) if "div" not in call.name else (1 / other if other else 0.0)
            call.tape.mark(out, _mark("factor", repr(factor), call))
        elif isinstance(other, Tensor) and not other.dim():
            call.tape.mark(out, _mark("factor", "tensor", call))


def _mark(kind: str, name: str, call: Call) -> Mark:
    return Mark(kind, name, "", call.site, call.tape.module, 0)


def _factor(marks: Iterable[Mark]) -> float | None:
    """The number that a loss was multiplied by last; NaN for one that nobody knows; None for none."""
    factors = [mark.name for mark in marks if mark.kind == "factor"]
    if not factors:
        return None
    return float("nan") if factors[-1] == "tensor" else float(factors[-1])

