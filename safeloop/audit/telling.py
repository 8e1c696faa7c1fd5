"""Puts what a replay found into the faults of the finite check: where the value was born, why, and what to write."""

from __future__ import annotations

from dataclasses import replace

from safeloop.audit.diagnosis import Diagnosis
from safeloop.checks.gradients.nonfinite import NonFiniteGradient
from safeloop.checks.terms.kinds import TermIsNotFinite
from safeloop.faults import Fault
from safeloop.nonfinite import Birth


def told(fault: Fault, found: Diagnosis, step: int) -> Fault:
    """A fault with the origin that a replay found; another kind of fault as it is."""
    if fault.code == TermIsNotFinite.code:
        births = [found.term_births.get(name) for name in fault.names]
        return _with_birth(fault, next(iter(births), None), found, step)
    if fault.code == NonFiniteGradient.code:
        if found.gradient_terms:
            named = ", ".join(f"`{name}`" for name in found.gradient_terms)
            fault = replace(fault, what=f"{fault.what}; loss term {named}")
        return _with_birth(fault, found.gradient_birth, found, step)
    return fault


def _with_birth(fault: Fault, birth: Birth | None, found: Diagnosis, step: int) -> Fault:
    if birth is None:
        return replace(fault, why=f"{fault.why}; {found.note}") if found.note else fault
    return with_birth(fault, birth, _moment(found, step), found.note)


def with_birth(fault: Fault, birth: Birth, moment: str, note: str = "") -> Fault:
    """A fault with the operation at which its NaN or infinity was born, the reason and the remedy."""
    given = "; ".join(f"{reading}" for reading in birth.inputs)
    why = [_why(birth), f"the operation was given {given}" if given else "", note]
    return replace(
        fault,
        where=f"{moment}; {_place(birth)}",
        why="; ".join(part for part in why if part),
        fix=_fix(birth, fault),
    )


def _moment(found: Diagnosis, step: int) -> str:
    phase = "" if found.phase == "train" else f", phase `{found.phase}`"
    micro = f", micro-batch {found.micro_batch + 1} of {found.num_micro_batches}" if found.num_micro_batches > 1 else ""
    return f"step {step}{phase}{micro}"


def _place(birth: Birth) -> str:
    if birth.phase == "given" and birth.place is None:
        return birth.what
    module = f", module `{birth.module}`" if birth.module else ""
    place = f", {birth.place}" if birth.place is not None else ""
    return f"{'' if birth.phase == 'given' else 'born in '}{birth.what}{module}{place}"


def _why(birth: Birth) -> str:
    if birth.explanation is not None:
        return birth.explanation.why
    if birth.phase == "given":
        holder = "the batch" if birth.op.startswith("batch") else birth.op if "`" in birth.op else "a tensor"
        return f"{holder} held it before the step began; no operation of the step made it"
    kind = "NaN" if birth.kind == "nan" else "infinity"
    return f"it gave {kind} at {birth.num_bad} of {birth.size} entries"


def _fix(birth: Birth, fault: Fault) -> str:
    if birth.explanation is not None:
        return birth.explanation.fix
    if birth.phase != "given":
        return fault.fix
    if birth.op.startswith("batch"):
        return (
            f"look at where `{birth.op}` comes from: replace missing values or drop such samples in the data set; "
            "`nonfinite.policy: skip` leaves such batches out"
        )
    if birth.op.startswith("parameter"):
        return "the weights were bad before the step: look at what was loaded into the model, or wrote to it"
    if birth.op.startswith("buffer"):
        return "look at what wrote to the buffer: running statistics of a batch that held infinity, or loaded values"
    return "look at where the tensor was made: numpy, a file, or an attribute set before the step"
