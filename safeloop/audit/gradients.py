"""Keeps the history of every parameter's gradients, and finds out why one is missing or zero."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from safeloop.autograd.norms import each_norm, exact_norm
from safeloop.autograd.opnames import COMPARISONS, ESCAPES
from safeloop.autograd.survey import leaves_below, survey
from safeloop.autograd.tape import Tape
from safeloop.autograd.zeros import Stop, ZeroTrace
from safeloop.checks.gradients.history import SAMPLED, SCORED, Cause, History, Sampled, Trace
from safeloop.checks.gradients.magnitude import FAINT, STILL, TINY

ENOUGH_STEPS = 5
"""Steps that must have been looked at before anything is said of what their gradients show together"""
_SURELY = 2
"""Steps with a gradient of zeros after which the operation that stops it is looked for."""
_OTHERS = 2
"""So many other lines are told where a value was cut off."""


class GradientWatch:
    """Looks at gradients on the steps of the audit. Reading them waits for the device.

    Args:
        model: whose parameters they are.
    """

    def __init__(self, model: nn.Module) -> None:
        dimensions = {name: p.dim() for name, p in model.named_parameters()}
        self.history = History(dimensions=dimensions, weight_of=_weights(model))
        self._model = model
        self._trace: ZeroTrace | None = None
        self._ids: dict[str, int] = {}
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
        self._ids = {name: id(p) for name, p in wanted.items()}
        self._reached |= {name for name, key in self._ids.items() if key in found.leaves}
        self._ever |= self._reached
        self._tapes += 1
        bits = {name: 1 << i for i, name in enumerate(tape.names)}
        for name in wanted:
            bit = bits.get(name, 0)
            self._usage[name] = self._usage.get(name, 0) + bool(tape.used & bit)
            if name in self._reached:
                self._forget_cut(self.history.traces.get(name))
            elif bit and found.is_complete:
                self._of(name).cause = cause_of(bit, tape, roots)
        self._note_samples(roots, tape)
        if any(t.cause is None and _is_stopped(t) for t in self.history.traces.values()):
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
                trace.dropped += name in self._reached
            elif norm == 0:
                trace.zero += 1
                trace.still += 1
            elif math.isfinite(norm):
                if trace.still:  # whatever has stopped it lets something through again
                    trace.still, trace.cause = 0, None
                trace.largest, trace.smallest = max(trace.largest, norm), min(trace.smallest, norm)
                trace.tiny += norm < TINY * top
                trace.faint += norm < min(STILL, FAINT * top)
            if name in norms:
                self._forget_cut(trace)
        self._reached.clear()

    def _note_samples(self, roots: Sequence[Tensor], tape: Tape) -> None:
        """Samples that go into these losses, of distributions whose parameters the losses reach in another way."""
        scored = functools.reduce(operator.or_, (m.live for m in tape.marks if m.kind == SCORED), 0)
        samples = {m for root in roots for m in tape.marks_of(root) if m.kind == SAMPLED}
        nodes = [root.grad_fn for root in roots if root.grad_fn is not None] if samples else []
        reached = leaves_below(*nodes, beside="NormalBackward")
        for mark in samples:
            names = tuple(name for name in tape.names_of(mark.live) if self._ids.get(name) in reached)
            if names:
                seen = self.history.samples.setdefault(mark.site, Sampled(names))
                seen.steps += 1
                seen.is_scored |= bool(mark.live & scored)

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

    @staticmethod
    def _forget_cut(trace: Trace | None) -> None:
        """A backward pass reaches it after all; another one, of a loss that does not, had a cause to tell."""
        if trace is not None and trace.cause is not None and trace.cause.kind not in _OF_STOPS:
            trace.cause = None

    def _explain(self, stops: Sequence[Stop], parameters: Mapping[str, nn.Parameter], tape: Tape) -> None:
        for name, parameter in parameters.items():
            trace = self.history.traces.get(name)
            if trace is None or not (trace.zero or trace.dropped) or trace.cause is not None:
                continue
            behind = [stop for stop in stops if id(parameter) in stop.leaves]
            stop = next((stop for stop in behind if (stop.kind == "dropped") == bool(trace.dropped)), None)
            if stop is not None:
                origin = tape.origin_of(stop.number)
                site = stop.site or (origin.site if origin else None)
                trace.cause = Cause(_why_stopped(stop), site, origin.module if origin else "", stop.kind)


def has_moved(before: Tensor, now: Tensor) -> bool:
    """Whether a parameter was trained meanwhile: weight decay alone multiplies all of it by one number."""
    before, now = before.flatten().double(), now.detach().flatten().double()
    size = before.square().sum()
    scale = (before * now).sum() / size if size else size
    return not torch.allclose(now, before * scale, rtol=1e-4, atol=1e-9)


def cause_of(bit: int, tape: Tape, roots: Iterable[Tensor]) -> Cause:
    """Why the parameter that a bit stands for is not reached from the roots, by what the tape has seen."""
    on_the_way = [m for root in roots for m in tape.marks_of(root) if m.kind == "cut" and m.live & bit]
    cuts = [m for m in tape.marks if m.kind == "cut" and m.live & bit]
    elsewhere = sorted((m for m in cuts if m not in on_the_way), key=lambda m: m.name in COMPARISONS)
    if not on_the_way and any(tape.live(root) & bit for root in roots):
        text = "only a derivative that does not depend on them reaches the loss"
        return Cause(text, tape.first_use_of(bit), kind="derivative")
    if on_the_way or elsewhere:
        mark, *others = [*on_the_way, *elsewhere]
        text = f"no path leads from them to a loss; their value left the graph by {mark.reason}"
        if on_the_way:
            text = f"their value reaches the loss without a gradient path: cut by {mark.reason}"
        told = sorted((m for m in others if m.name not in COMPARISONS), key=lambda m: m.name not in ESCAPES)
        sites = dict.fromkeys(m.site for m in told if m.site is not None and m.site != mark.site)
        kind = "cut" if on_the_way else "escape"
        return Cause(text, mark.site, mark.module, kind, tuple(sites)[:_OTHERS], mark.name, mark.callers)
    if tape.used & bit:
        text = "they are used, but nothing that is computed from them reaches a loss"
        return Cause(text, tape.first_use_of(bit), kind="escape")
    return Cause("no torch function was ever called with them: the forward does not use them", kind="unused")


def _is_stopped(trace: Trace) -> bool:
    """Whether nothing but zeros came, or nothing although a graph led to it."""
    return trace.still >= _SURELY or (trace.dropped >= _SURELY and trace.dropped == trace.steps)


_OF_STOPS = ("zero", "empty", "dropped", "hooked", "cancelled", "attention")
_WHY_ZERO = {
    "BackwardHookFunction": "a backward hook of the module returns zeros",
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
    "Trunc": "cutting off decimals has the derivative zero everywhere",
    "Heaviside": "a step function has the derivative zero everywhere",
    "Normal": "torch.normal draws a sample, which has the derivative zero everywhere in its mean and std",
    "Poisson": "a drawn sample has the derivative zero everywhere in its rate",
    "Bernoulli": "a drawn sample has the derivative zero everywhere in its probabilities",
    "Where": "the other branch is chosen for every element",
    "Max": "the other argument is larger for every element",
    "Sigmoid": "every element is saturated, so that the derivative underflows to zero",
    "Tanh": "every element is saturated, so that the derivative underflows to zero",
    "Softmax": "the softmax is saturated, or runs over a single value: its derivative is zero",
}


def _why_stopped(stop: Stop) -> str:
    node = stop.name
    if stop.kind == "hooked":
        return "a hook on it (`register_hook`) turns a gradient that is not zero into zeros"
    if stop.kind == "cancelled":
        return "it is used several times, and the gradients of its uses cancel: what is added is taken off again"
    if stop.kind == "dropped":
        return f"{node.removesuffix('Backward')}.backward returns None in the place of its gradient"
    for name, text in _WHY_ZERO.items():
        if node.startswith(name):
            return f"{node} lets no gradient through: {text}"
    return f"{node} lets no gradient through: its derivative is zero at these values"


def _weights(model: nn.Module) -> dict[str, str]:
    """The bias of each of torch's own layers -> its weight."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        own = module._parameters
        if type(module).__module__.startswith("torch.nn.") and own.get("bias") is not None and "weight" in own:
            prefix = f"{path}." if path else ""
            found[f"{prefix}bias"] = f"{prefix}weight"
    return found


def _norms(gradients: list[Tensor]) -> list[float]:
    if not gradients:
        return []
    with torch.no_grad():
        norms = [float(norm) for norm in each_norm(gradients)]
        return [float(exact_norm([g])) if n == math.inf else n for n, g in zip(norms, gradients, strict=True)]


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
