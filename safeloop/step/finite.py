"""The finite check: nothing non-finite reaches a parameter, at the price of the norm that the log needs anyway."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from safeloop.autograd.norms import each_norm, exact_norm
from safeloop.checks.gradients.nonfinite import NonFiniteGradient
from safeloop.checks.stages import gradient_faults
from safeloop.checks.update.order import SkippedTooOften
from safeloop.checks.views import GradientsView
from safeloop.faults import Fault, FaultError
from safeloop.optim.owner import Owner
from safeloop.step.report import Frame


def gather(owner: Owner) -> list[Tensor]:
    """The gradients that an owner's parameters have, in order; sparse ones coalesced in place."""
    gradients = [p.grad for p in owner.tensors if p.grad is not None]
    if any(gradient.is_sparse for gradient in gradients):
        for parameter in owner.tensors:
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()
        gradients = [p.grad for p in owner.tensors if p.grad is not None]
    return gradients


def measure(owners: Iterable[Owner], frame: Frame) -> None:
    """Gather each owner's gradients and their norms into `frame`; no sync."""
    for owner in owners:
        gradients = frame.gradients[owner.name] = gather(owner)
        frame.report.num_gradients[owner.name] = len(gradients)
        if not gradients:
            continue
        is_dense = all(gradient.layout is torch.strided for gradient in gradients)
        each = each_norm(gradients, uniform=owner.is_uniform and is_dense)
        frame.totals[owner.name] = torch.linalg.vector_norm(each)
        if frame.wants_modules:
            frame.report.each_norm[owner.name] = each
            frame.report.present[owner.name] = [name for name, p in owner.parameters.items() if p.grad is not None]


class ImmediateGate:
    """Looks at the norms before the update: free on CPU, one sync per step elsewhere.

    Policy `raise` raises the fault; `skip` leaves out the update of every owner of the phase, and raises where more
    than `max_consecutive` turns in a row were skipped.
    """

    is_deferred = False

    def __init__(self, *, policy: str = "raise", max_consecutive: int | None = None) -> None:
        self.policy = policy
        self.refused: Frame | None = None
        """the turn that the error now raised is about"""
        self._max_consecutive = max_consecutive
        self._consecutive = 0

    def check(self, frame: Frame, owners: Sequence[Owner]) -> None:
        """Raise or mark the turn as skipped where a gradient or a loss term is not finite."""
        measure(owners, frame)
        is_finite = True
        for name, total in frame.totals.items():
            norm = total.item()
            frame.report.norms[name] = norm
            is_finite = is_finite and math.isfinite(norm)
        for value in frame.terms.values():
            is_finite = is_finite and math.isfinite(value.item())
        if is_finite:
            self._consecutive = 0
        else:
            self._refuse(frame, owners)

    def finish(self) -> None:
        """Nothing is pending: every step was looked at before its update."""

    def _refuse(self, frame: Frame, owners: Sequence[Owner]) -> None:
        faults = gradient_faults(_view(owners, frame))
        if not faults:
            _correct_overflow(frame)
            return
        frame.faults = faults
        if self.policy == "raise":
            self.refused = frame
            raise FaultError(faults[0], faults[1:])
        self._consecutive += 1
        frame.is_skipped = True
        if self._max_consecutive is not None and self._consecutive > self._max_consecutive:
            self.refused = frame
            raise FaultError(_too_often(self._consecutive, self._max_consecutive, frame), faults)


class DeferredGate:
    """Never waits for the device: a flag there blocks a bad update and every later one; it is read one turn later.

    Needs optimizers whose fused kernel takes `found_inf`. When the fault is raised, the weights are those from
    before the bad step.
    """

    is_deferred = True
    policy = "raise"

    def __init__(self, owners: Iterable[Owner], device: torch.device) -> None:
        self._owners = tuple(owners)
        self._flag = torch.zeros((), device=device)
        self._one = torch.ones((), device=device)
        self._copy = _HostCopy(device)
        self._pending: Frame | None = None
        self.refused: Frame | None = None
        """the turn that the error now raised is about"""
        for owner in self._owners:
            owner.optimizer.found_inf = self._flag  # type: ignore[attr-defined]

    def check(self, frame: Frame, owners: Sequence[Owner]) -> None:
        """Raise where the *previous* turn was bad; mark this one on the device."""
        measure(owners, frame)
        frame.report.norms.update(frame.totals)
        readings = [x.to(self._flag) for x in (*frame.totals.values(), *frame.terms.values())]
        if readings:  # the kernel of torch's GradScaler: raises the flag, multiplies by 1; one launch
            torch._amp_foreach_non_finite_check_and_unscale_([torch.stack(readings)], self._flag, self._one)
        self._look_back()
        self._pending = frame
        self._copy.begin(self._flag)

    def finish(self) -> None:
        """Look at the last turn, and give the optimizers back as they were."""
        try:
            self._look_back()
        finally:
            for owner in self._owners:
                if hasattr(owner.optimizer, "found_inf"):
                    del owner.optimizer.found_inf

    def _look_back(self) -> None:
        frame, self._pending = self._pending, None
        if frame is not None and self._copy.value():
            self.refused = frame
            raise FaultError(_deferred_fault(frame))


class _HostCopy:
    """A number of a device, copied to the host while the device goes on."""

    def __init__(self, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._host = torch.empty((), device="cpu", pin_memory=is_cuda)
        self._event = torch.cuda.Event() if is_cuda else None  # type: ignore[no-untyped-call]

    def begin(self, value: Tensor) -> None:
        """Copy as soon as the device has come to here."""
        self._host.copy_(value, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def value(self) -> float:
        """What `begin` was given; waits until it is there."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._host.numpy().item())


def _view(owners: Sequence[Owner], frame: Frame) -> GradientsView:
    parameters = {name: parameter for owner in owners for name, parameter in owner.parameters.items()}
    return GradientsView(parameters, frame.terms, frame.report.step, f"step {frame.report.step}, {frame.source}")


def _correct_overflow(frame: Frame) -> None:
    """All gradients are finite and only their float32 norm overflowed: measure again in float64."""
    for name, total in frame.totals.items():
        if not math.isfinite(total.item()):
            frame.totals[name] = exact_norm(frame.gradients[name])
            frame.report.norms[name] = frame.totals[name].item()


def _deferred_fault(frame: Frame) -> Fault:
    norms = {name: float(total) for name, total in frame.totals.items()}
    terms = {name: float(value) for name, value in frame.terms.items()}
    bad = [f"gradient norm of `{name}` {value}" for name, value in norms.items() if not math.isfinite(value)]
    bad += [f"loss term `{name}` {value}" for name, value in terms.items() if not math.isfinite(value)]
    return NonFiniteGradient.fault(
        "; ".join(bad),
        where=f"step {frame.report.step}; read one step later, no weight has changed since",
        fix="run the same config with `device: cpu` to have the parameters named",
    )


def _too_often(count: int, limit: int, frame: Frame) -> Fault:
    return SkippedTooOften.fault(
        f"{count} updates in a row were skipped for a non-finite gradient or loss term",
        where=f"step {frame.report.step}",
        why="a batch that cannot be used is an accident; a row of them means that the model or the data is broken",
        fix=f"mend the cause below, or raise `nonfinite.max_consecutive` (now {limit})",
    )
