"""The penalties by name. A new penalty is one file and one name here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safeloop.penalties.base import Penalty
from safeloop.penalties.forces import Forces
from safeloop.penalties.gradient import GradientPenalty
from safeloop.penalties.hessian_trace import HessianTrace
from safeloop.penalties.input_gradient import InputGradient
from safeloop.penalties.jacobian import Jacobian
from safeloop.penalties.output_jacobian import OutputJacobian
from safeloop.penalties.r1 import R1
from safeloop.penalties.r2 import R2
from safeloop.penalties.spectral import SpectralNorm
from safeloop.penalties.zero_centred import ZeroCentred
from safeloop.signatures import union

PENALTIES: dict[str, type[Penalty]] = {
    "gradient": GradientPenalty,
    "r1": R1,
    "r2": R2,
    "zero_centred": ZeroCentred,
    "input_gradient": InputGradient,
    "jacobian": Jacobian,
    "output_jacobian": OutputJacobian,
    "spectral": SpectralNorm,
    "hessian_trace": HessianTrace,
    "forces": Forces,
}

if TYPE_CHECKING:
    AnyPenalty = Penalty
else:
    AnyPenalty = union(PENALTIES)
