"""Keeps the history of every parameter's gradients, and finds out why one is missing or zero."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from safeloop.autograd.norms import each_norm
from safeloop.autograd.survey import survey
from safeloop.autograd.tape import Tape
from safeloop.autograd.zeros import Stop, ZeroTrace
from safeloop.checks.gradients.history import Cause, History, Trace
from safeloop.checks.gradients.magnitude import TINY

ENOUGH_STEPS = 5
"""Steps that must have been looked at before anything is said of what their gradients show together"""
_SURELY = 2
"""Steps with a gradient of zeros after which the operation that stops it is looked for."""


class GradientWatch:
    """Looks at gradients on the steps of the audit. Reading them waits for the device.

    Args:
        model: whose parameters they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self.history = History(dimensions={name: p.dim() for name, p in model.named_parameters()})
        self._model = model
        self._trace: ZeroTrace | None = None
        self._reached: set[str] = set()
        self._ever: set[str] = set()
        self._usage: dict[str, int] = {}
        self._tapes = 0
        self._wanted: Mapping[str, nn.Parameter] = {}
        self._before: list[tuple[str, nn.Parameter, Tensor]] = []
        """parameters without a gradient, and what they were when the history was looked at first"""

    def before(self, roots: Sequence[Tensor], tape: Tape, wanted: Mapping[str, nn.Parameter]) -> None:
        """Before a backward pass: why it misses parameters, and hooks where zeros are to be explained."""
        found = survey(*roots)
        self._wanted = wanted
        ids = {id(p): name for name, p in wanted.items()}
        self._reached |= {ids[key] for key in found.leaves if key in ids}
        self._ever |= self._reached
        self._tapes += 1
        bits = {name: 1 << i for i, name in enumerate(tape.names)}
        for name in wanted:
            bit = bits.get(name, 0)
            self._usage[name] = self._usage.get(name, 0) + bool(tape.used & bit)
            if bit and found.is_complete and name not in self._reached:
                self._of(name).cause = cause_of(bit, tape, roots)
        zeros = [t for t in self.history.traces.values() if t.zero >= _SURELY and t.zero + t.absent == t.steps]
        if any(t.cause is None for t in zeros):
            if self._trace is not None:
                self._trace.finish()
            self._trace = ZeroTrace(roots)

    def after(self, parameters: Mapping[str, nn.Parameter], tape: Tape | None, where: str) -> None:
        """After the backward passes of a step: what gradients these parameters have."""
        if self._trace is not None and tape is not None:
            self._explain(self._trace.finish(), parameters, tape)
            self._trace = None
        present = {name: p.grad for name, p in parameters.items() if p.grad is not None and p.requires_grad}
        norms = dict(zip(present, _norms(list(present.values())), strict=True))
        finite = [norm for norm in norms.values() if math.isfinite(norm)]
        top = max(finite, default=0.0)
        self.history.steps += 1
        self.history.where = where
        self.history.total = max(self.history.total, top)
        for name, parameter in parameters.items():
            if not parameter.requires_grad:
                continue
            trace = self._of(name)
            trace.steps += 1
            norm = norms.get(name)
            if norm is None:
                trace.absent += name not in self._ever
            elif norm == 0:
                trace.zero += 1
            elif math.isfinite(norm):
                trace.largest, trace.smallest = max(trace.largest, norm), min(trace.smallest, norm)
                trace.tiny += norm < TINY * top
            if name in norms and trace.cause is not None and trace.cause.kind not in ("zero", "empty", "attention"):
                trace.cause = None
        self._reached.clear()

    def finish(self) -> History:
        """The history, with the parameters of modules that are chosen by the data, and those that have moved since.

        Reads the device, for parameters that had no gradient or only zeros.
        """
        history = self.history
        history.routed, history.optional = _chosen(self._model, self._usage, self._tapes)
        idle = {n for n, trace in history.traces.items() if trace.steps and trace.absent + trace.zero == trace.steps}
        if history.windows:
            history.moved |= {name for name, parameter, old in self._before if has_moved(old, parameter)}
        else:
            self._before = [(n, p, p.detach().clone()) for n, p in self._wanted.items() if n in idle]
        history.windows += 1
        return history

    def _of(self, name: str) -> Trace:
        return self.history.traces.setdefault(name, Trace())

    def _explain(self, stops: Sequence[Stop], parameters: Mapping[str, nn.Parameter], tape: Tape) -> None:
        for name, parameter in parameters.items():
            trace = self.history.traces.get(name)
            if trace is None or not trace.zero or trace.cause is not None:
                continue
            stop = next((stop for stop in stops if id(parameter) in stop.leaves), None)
            if stop is not None:
                origin = tape.origins.get(stop.number)
                trace.cause = Cause(
                    _why_zero(stop.name),
                    origin.site if origin else None,
                    origin.module if origin else "",
                    "empty" if stop.is_empty else "attention" if stop.is_attention else "zero",
                )


def has_moved(before: Tensor, now: Tensor) -> bool:
    """Whether a parameter was trained meanwhile: weight decay alone multiplies all of it by one number."""
    before, now = before.flatten().double(), now.detach().flatten().double()
    size = before.square().sum()
    scale = (before * now).sum() / size if size else size
    return not torch.allclose(now, before * scale, rtol=1e-4, atol=1e-9)


def cause_of(bit: int, tape: Tape, roots: Iterable[Tensor]) -> Cause:
    """Why the parameter that a bit stands for is not reached from the roots, by what the tape has seen."""
    on_the_way = [m for root in roots for m in tape.marks_of(root) if m.kind == "cut" and m.live & bit]
    if on_the_way:
        mark = on_the_way[0]
        text = f"their value reaches the loss without a gradient path: cut by {mark.reason}"
        return Cause(text, mark.site, mark.module, "cut", mark.name, mark.callers)
    if any(tape.live(root) & bit for root in roots):
        text = "only a derivative that does not depend on them reaches the loss"
        return Cause(text, tape.first_use_of(bit), kind="derivative")
    elsewhere = [m for m in tape.marks if m.kind == "cut" and m.live & bit]
    if elsewhere:
        mark = elsewhere[0]
        text = f"no path leads from them to a loss; their value left the graph by {mark.reason}"
        return Cause(text, mark.site, mark.module, "escape", mark.name, mark.callers)
    if tape.used & bit:
        text = "they are used, but nothing that is computed from them reaches a loss"
        return Cause(text, tape.first_use_of(bit), kind="escape")
    return Cause("no torch function was ever called with them: the forward does not use them", kind="unused")


_WHY_ZERO = {
    "Relu": "every unit of this ReLU is inactive for the whole batch: its derivative is zero there",
    "Threshold": "every unit is below the threshold for the whole batch",
    "Clamp": "the clamp is saturated for every element: its derivative is zero there",
    "Hardtanh": "every element is saturated: the derivative is zero there",
    "Hardsigmoid": "every element is saturated: the derivative is zero there",
    "Mul": "the other factor is zero",
    "Lerp": "the factor that mixes them is zero",
    "Addmm": "the weight, the other factor, is zero",
    "Mm": "the other factor is zero",
    "Bmm": "the other factor is zero",
    "Convolution": "the weight, the other factor, is zero",
    "Div": "the factor is zero",
    "Round": "rounding has the derivative zero everywhere",
    "Floor": "floor has the derivative zero everywhere",
    "Ceil": "ceil has the derivative zero everywhere",
    "Sign": "the sign has the derivative zero everywhere",
    "Where": "the other branch is chosen for every element",
    "Max": "the other argument is larger for every element",
    "Sigmoid": "every element is saturated, so that the derivative underflows to zero",
    "Tanh": "every element is saturated, so that the derivative underflows to zero",
    "Softmax": "the softmax is saturated, or runs over a single value: its derivative is zero",
}


def _why_zero(node: str) -> str:
    for name, text in _WHY_ZERO.items():
        if node.startswith(name):
            return f"{node} lets no gradient through: {text}"
    return f"{node} lets no gradient through: its derivative is zero at these values"


def _norms(gradients: list[Tensor]) -> list[float]:
    if not gradients:
        return []
    with torch.no_grad():
        return [float(norm) for norm in each_norm([g.coalesce()._values() if g.is_sparse else g for g in gradients])]


def _chosen(model: nn.Module, usage: Mapping[str, int], times: int) -> tuple[frozenset[str], frozenset[str]]:
    """Parameters of a ModuleList or ModuleDict: those of which some are used on some steps only, and those never used.

    The first ones are chosen by the data or by chance. The second ones have neighbours that are used on every step.
    """
    routed: set[str] = set()
    optional: set[str] = set()
    for path, container in model.named_modules():
        if not isinstance(container, (nn.ModuleList, nn.ModuleDict)):
            continue
        prefix = f"{path}." if path else ""
        members: dict[str, list[str]] = {}
        for name in usage:
            if name.startswith(prefix):
                members.setdefault(name.removeprefix(prefix).partition(".")[0], []).append(name)
        counts = {key: max(usage[name] for name in names) for key, names in members.items()}
        if any(0 < count < times for count in counts.values()):
            routed.update(name for names in members.values() for name in names)
        elif path and any(counts.values()):
            optional.update(name for key, names in members.items() if not counts[key] for name in names)
    return frozenset(routed), frozenset(optional - routed)
