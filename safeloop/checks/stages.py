"""The checks of each stage, run together: their faults in the order in which they should be told."""

from __future__ import annotations

from collections.abc import Iterable

from safeloop.checks.gradients.nonfinite import NonFiniteGradient
from safeloop.checks.penalties.second import OperationWithoutSecondDerivative
from safeloop.checks.setup.attributes import ModulesInPlainContainer, NonLeafAttribute, PlainTensorAttribute
from safeloop.checks.setup.optimizers import NothingToTrain, StaleOptimizer
from safeloop.checks.setup.ownership import ParameterOwnedTwice, PatternMatchesNothing, UnownedParameter
from safeloop.checks.terms.declared import DeclaredTermMissing
from safeloop.checks.terms.graph import TermHasNoGradientPath, TermIgnoresTheModel, TermReachesWhatItDoesNotTrain
from safeloop.checks.terms.kinds import TermIsAPythonNumber, TermIsNotFinite, TermIsNotFloatingPoint
from safeloop.checks.terms.values import TermIsNotATensor, TermIsNotScalar, TermWeightsOfWrongShape
from safeloop.checks.views import GradientsView, SetupView, TermsView
from safeloop.faults import Fault

_SETUP = (
    PatternMatchesNothing,
    NonLeafAttribute,
    PlainTensorAttribute,
    ModulesInPlainContainer,
    StaleOptimizer,
    ParameterOwnedTwice,
    NothingToTrain,
    UnownedParameter,
)
_TERMS = (
    DeclaredTermMissing,
    TermIsAPythonNumber,
    TermIsNotATensor,
    TermIsNotFloatingPoint,
    TermWeightsOfWrongShape,
    TermIsNotScalar,
    TermHasNoGradientPath,
    TermIgnoresTheModel,
    TermReachesWhatItDoesNotTrain,
    OperationWithoutSecondDerivative,
)
_GRADIENTS = (TermIsNotFinite, NonFiniteGradient)


def setup_faults(view: SetupView) -> list[Fault]:
    """What is wrong with the model and its owners, before the first forward; errors first, then the most specific.

    Call it before any forward pass of the run, since a state that a forward keeps is not yet there. Cost: a walk over
    the modules; the methods' bytecode is read only where something was found.
    """
    return _errors_first(fault for check in _SETUP for fault in check.find(view))


def term_faults(view: TermsView) -> list[Fault]:
    """What is wrong with the returned loss terms, by type, shape and graph; errors first, then the most specific.

    Nothing is read from the device on a healthy step. Cost: about 2 us for each node of each term's graph.
    """
    return _errors_first(fault for check in _TERMS for fault in check.find(view))


def gradient_faults(view: GradientsView) -> list[Fault]:
    """Which loss terms and gradients are not finite, terms first. It reads every gradient: only for a bad norm."""
    return [fault for check in _GRADIENTS for fault in check.find(view)]


def _errors_first(faults: Iterable[Fault]) -> list[Fault]:
    return sorted(faults, key=lambda fault: fault.severity != "error")
