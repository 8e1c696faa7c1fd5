"""Where a loss without a graph came from, of which a loop of the user's asks a gradient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from numbers import Number

import torch
from torch import Tensor

from safeloop.autograd.lineage import Mark
from safeloop.autograd.opnames import COMPARISONS, ESCAPES
from safeloop.autograd.tape import Tape
from safeloop.checks.check import Check
from safeloop.checks.graph.derivatives import TensorWithoutGraph
from safeloop.checks.source import at, frames, user_frame
from safeloop.checks.terms.kinds import TermIsAPythonNumber
from safeloop.checks.terms.values import TermIsNotATensor
from safeloop.checks.wording import listed
from safeloop.faults import Fault

_MANY = 2


def with_origin(fault: Fault, error: BaseException, tape: Tape) -> Fault:
    """The fault with what the tape knows of the tensor: the line that made it, and where its path was cut."""
    asked = [t for t in _asked_of(error) if not t.requires_grad]
    if fault.code != TensorWithoutGraph.code or not asked:
        return fault
    marks = list({id(m): m for t in asked for m in tape.marks_of(t) if m.kind == "cut"}.values())
    made = dict.fromkeys(at(site, "") for t in asked if (site := tape.site_of(t)) is not None)
    if not marks and not made:  # it was made while nobody looked: nothing is known of it
        return fault
    where = "".join(f"; made at {line}" for line in list(made)[:_MANY])
    if marks:
        why = f"its gradient path to {listed(_reached(marks, tape))} was {_cuts(marks)}"
    elif left := _left(tape):
        why = f"nothing that it was computed from has a path to a parameter; the graph was {_cuts(left)}"
    else:
        why = "nothing that it was computed from has a path to a parameter: what the model gave is not used in it"
    ends = dict.fromkeys(at(mark.site, "") for mark in marks or _left(tape) if mark.site is not None)
    where += "".join(f"; cut at {line}" for line in list(ends)[:1])
    return replace(fault, where=fault.where + where, why=why)


def no_tensor(error: AttributeError, tape: Tape) -> Iterator[Fault]:
    """The fault of `backward()` on what is no tensor: a Python number, None, a numpy array or a collection."""
    value, found = error.obj, user_frame(error.__traceback__)
    if error.name != "backward" or found is None or not (value is None or _is_data(value)):
        return
    left = _left(tape)
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    check: type[Check] = TermIsAPythonNumber if isinstance(value, Number) else TermIsNotATensor
    why = "a path of the function that computes it ends without `return`" if value is None else "it carries no graph"
    yield check.fault(
        "`backward()` is called on " + ("None" if value is None else f"a {kind}") + ", not on a tensor",
        where=str(found[1]),
        why=why + (f"; a value of the model's was {_cuts(left)}" if left and value is not None else ""),
        fix="compute the loss with torch functions, as one 0-d tensor, without `.item()`, `float()` or numpy; take it "
        "out of a tuple or dict before `backward()`",
    )


def _is_data(value: object) -> bool:
    return isinstance(value, Number | tuple | list | dict) or type(value).__module__ == "numpy"


def _asked_of(error: BaseException) -> Iterator[Tensor]:
    """The tensors that `torch.autograd` was asked to differentiate, from its own frames."""
    for frame, _ in frames(error.__traceback__):
        if frame.f_code.co_filename != torch.autograd.__file__:
            continue
        name = {"backward": "tensors", "grad": "outputs"}.get(frame.f_code.co_name, "")
        value = frame.f_locals.get(name, ())
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, Tensor):
                yield item


def _reached(marks: list[Mark], tape: Tape) -> list[str]:
    live = 0
    for mark in marks:
        live |= mark.live
    return tape.names_of(live)


def _left(tape: Tape) -> list[Mark]:
    """Where values left torch; a detach() may be the first half of it, as in `detach().numpy()`."""
    cuts = [mark for mark in tape.marks if mark.kind == "cut"]
    escapes = [mark for mark in cuts if mark.name in ESCAPES - COMPARISONS]
    return escapes or [mark for mark in cuts if mark.name == "detach"]


def _cuts(marks: list[Mark]) -> str:
    """Where, and by what; where grad mode was off also who had called."""
    first = {mark.site: mark for mark in reversed(marks)}
    told = [mark for mark in marks if first[mark.site] is mark]
    return "; ".join(_cut(mark) for mark in told[:_MANY])


def _cut(mark: Mark) -> str:
    called = "".join(f", called from {at(site, '')}" for site in mark.callers[:_MANY])
    return f"cut at {at(mark.site, 'an unknown line')}{called}, by {mark.reason}"
