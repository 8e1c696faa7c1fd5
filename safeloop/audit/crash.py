"""What an error that ended somebody's loop means, told as faults."""

from __future__ import annotations

import re
from collections.abc import Iterator
from traceback import walk_tb
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad

from safeloop.audit.cut_off import no_tensor, with_origin
from safeloop.autograd.tape import Tape
from safeloop.checks.events import Update
from safeloop.checks.gradients.flow import NoGradient
from safeloop.checks.graph.saved import SavedTensorChanged
from safeloop.checks.graph.torch_errors import translate
from safeloop.checks.source import at, user_frame
from safeloop.checks.update.clip_order import ClipWithoutEffect
from safeloop.checks.update.half import LossNotScaled
from safeloop.checks.wording import listed
from safeloop.faults import Fault

if TYPE_CHECKING:
    from safeloop.audit.foreign import LoopWatch

_CHANGED = re.compile(r"modified by an inplace operation: \[[\w.]+ \[(?P<shape>[\d, ]*)\]\]")
_INDICES = re.compile(r"did not receive grad for rank \d+: (?P<indices>[\d ]+)")
_REDUCTION = "Expected to have finished reduction in the prior iteration"


def crash_faults(error: Exception, model: nn.Module, watch: LoopWatch) -> list[Fault]:
    """The faults that explain an error of torch's, most specific first; none where we cannot say more than torch."""
    message = str(error)
    if isinstance(error, AssertionError):
        return list(_scaler_without_loss(error, message))
    if isinstance(error, AttributeError):
        return list(no_tensor(error, watch.tape))
    if not isinstance(error, RuntimeError):
        return []
    return [
        *_stepped_between(error, message, model, watch),
        *_unreduced(error, watch),
        *_nothing_to_clip(error),
        *_translated(error, model, watch.tape),
    ]


def _scaler_without_loss(error: AssertionError, message: str) -> Iterator[Fault]:
    """A gradient scaler that has never scaled a loss."""
    found = user_frame(error.__traceback__)
    where = "the scaler" if found is None else str(found[1])
    if "_scale is None" in message:
        yield LossNotScaled.fault(
            "the GradScaler has never scaled a loss: `scaler.scale` was not called",
            where=where,
            why="backward() ran on the plain loss, and the scaler has no factor yet to divide its gradients by",
            fix="scale every loss: `scaler.scale(loss).backward()`",
        )


def _nothing_to_clip(error: RuntimeError) -> Iterator[Fault]:
    """`clip_grad_value_` without a gradient, which torch refuses with a check of its own insides."""
    frames = [frame.f_code for frame, _ in walk_tb(error.__traceback__)]
    if not any(code.co_filename == clip_grad.__file__ and code.co_name == "clip_grad_value_" for code in frames):
        return
    if "nested_tensorlist[0].empty()" not in str(error):
        return
    found = user_frame(error.__traceback__)
    yield ClipWithoutEffect.fault(
        "`clip_grad_value_` found no gradient: none of the parameters that it was given has one",
        where="the clip" if found is None else str(found[1]),
        why="it runs before backward() has made gradients, after zero_grad() has thrown them away, or on another "
        "network",
        fix="clip between backward() and step(): backward, clip, step",
    )


def _translated(error: RuntimeError, model: nn.Module, tape: Tape) -> Iterator[Fault]:
    found = user_frame(error.__traceback__)
    where = "the loop" if found is None else str(found[1])
    fault = translate(error, terms_source=where, model=model)
    if fault is not None:
        yield with_origin(fault, error, tape)


def _stepped_between(error: RuntimeError, message: str, model: nn.Module, watch: LoopWatch) -> Iterator[Fault]:
    """A backward pass through weights that an optimizer has changed since the forward."""
    match = _CHANGED.search(message)
    if match is None:
        return
    shape = [int(n) for n in match["shape"].split(",") if n.strip()]
    parameters = dict(model.named_parameters())
    for event in reversed(watch.journal.state.order):
        if not isinstance(event, Update) or event.was_skipped:
            continue
        names = [
            name
            for name in sorted(watch.journal.state.owners[event.owner])
            if name in parameters and list(parameters[name].shape) in (shape, shape[::-1])
        ]
        if not names:
            continue
        found = user_frame(error.__traceback__)
        place = "the backward pass" if found is None else str(found[1])
        yield SavedTensorChanged.fault(
            f"a backward pass goes through {listed(names)} as they were before the step of `{event.owner}`, which has "
            "changed them since the forward",
            where=f"{place}; step of `{event.owner}`: {at(event.site, 'unknown')}",
            why="the graph was made with the old weights, and its derivative needs them",
            fix="run all backward passes before any step (keep the graph with retain_graph=True), or run the forward "
            "again after the step",
            names=names,
        )
        return


def _unreduced(error: RuntimeError, watch: LoopWatch) -> Iterator[Fault]:
    """DistributedDataParallel waits for gradients that never come."""
    if _REDUCTION not in str(error):
        return
    traces = watch.gradients.history.traces
    never = [name for name, trace in traces.items() if trace.steps and trace.absent == trace.steps]
    if names := never or _waited_for(error, watch):
        yield NoGradient.fault(
            f"DistributedDataParallel waits for the gradients of {listed(names)}, which took no part in the loss"
            f"{'' if never else ' of the iteration before'}",
            where=watch.gradients.history.where,
            why="it averages a gradient over the processes once every parameter of its bucket has one",
            fix="use these parameters in the forward, freeze them before wrapping the model, or pass "
            "`find_unused_parameters=True`",
            names=names,
        )


def _waited_for(error: RuntimeError, watch: LoopWatch) -> list[str]:
    """The parameters whose numbers torch gives, by the module in whose forward it raised."""
    numbers = _INDICES.search(str(error))
    wrapped = [frame.f_locals.get("self") for frame, _ in walk_tb(error.__traceback__)]
    for module in wrapped:
        if numbers is not None and isinstance(module, DistributedDataParallel):
            waiting = [(name, p) for name, p in module.module.named_parameters() if p.requires_grad]
            found = [waiting[int(n)] for n in numbers["indices"].split() if int(n) < len(waiting)]
            return [watch.journal.names.get(id(p), name) for name, p in found]
    return []
