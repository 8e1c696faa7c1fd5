"""The checks of each stage, run together: their faults in the order in which they should be told."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from safeloop.checks.check import CallCheck, EventCheck
from safeloop.checks.data.changed import DataChangedInPlace
from safeloop.checks.evaluation.buffers import BufferMovesInEvaluation
from safeloop.checks.evaluation.dropout import DropoutInEvaluation
from safeloop.checks.evaluation.forgotten import EvaluatedInTrainMode
from safeloop.checks.evaluation.left_in_eval import LeftInEvalMode
from safeloop.checks.evaluation.modes import GradModeLeftOff
from safeloop.checks.evaluation.statistics import FrozenStatistics, StatisticsFromValidation, StatisticsLeftBehind
from safeloop.checks.evaluation.switched_off import SwitchedOffByEvaluation
from safeloop.checks.evaluation.trained import TrainedInEvaluation
from safeloop.checks.gradients.flow import AlwaysZero, NoGradient, TermAlwaysZero
from safeloop.checks.gradients.history import History
from safeloop.checks.gradients.magnitude import ExplodingGradient, VanishingGradient
from safeloop.checks.gradients.nonfinite import NonFiniteGradient
from safeloop.checks.graph.itself import CopyOfItself
from safeloop.checks.graph.leaves import GradientOfNonLeaf
from safeloop.checks.graph.recomputed import CheckpointRunsTwice
from safeloop.checks.graph.samples import SampleWithoutGradient
from safeloop.checks.graph.straight_through import StraightThroughReversed
from safeloop.checks.penalties.second import OperationWithoutSecondDerivative
from safeloop.checks.setup.attributes import NonLeafAttribute, PlainTensorAttribute
from safeloop.checks.setup.containers import ModulesInPlainContainer
from safeloop.checks.setup.copies import TiedByCopy
from safeloop.checks.setup.freezing import FreezeWithoutEffect
from safeloop.checks.setup.keys import GroupKeyIgnored
from safeloop.checks.setup.late_freezing import LateFreezing
from safeloop.checks.setup.loop_owners import LoopOwners
from safeloop.checks.setup.made_anew import LayerMadeInForward
from safeloop.checks.setup.optimizers import NothingToTrain, StaleOptimizer, is_stale
from safeloop.checks.setup.ownership import ParameterOwnedTwice, UnownedParameter
from safeloop.checks.setup.patterns import PatternMatchesNothing
from safeloop.checks.setup.rates import GroupRateZero, LearningRatesFarApart
from safeloop.checks.setup.sharing import CopyIsTheOriginal
from safeloop.checks.setup.uncalled import BackwardOfModule
from safeloop.checks.terms.contained import TermContainsAnother
from safeloop.checks.terms.declared import DeclaredTermMissing
from safeloop.checks.terms.derivatives import DerivativeVanishes
from safeloop.checks.terms.graph import TermHasNoGradientPath, TermIgnoresTheModel, TermReachesWhatItDoesNotTrain
from safeloop.checks.terms.hand_made import PenaltyThroughBatchNorm, PenaltyWithoutGraph
from safeloop.checks.terms.kinds import TermIsAPythonNumber, TermIsNotFinite, TermIsNotFloatingPoint
from safeloop.checks.terms.misuse import BroadcastInLoss, ProbabilitiesAsLogits
from safeloop.checks.terms.normalised import NormalisedOverAnother
from safeloop.checks.terms.sums import PartOfSumWithoutGradient
from safeloop.checks.terms.values import TermIsNotATensor, TermIsNotScalar, TermWeightsOfWrongShape
from safeloop.checks.update.backwards import AverageGoesBackwards
from safeloop.checks.update.clip_order import ClipWithoutEffect
from safeloop.checks.update.clip_windows import ClippedInsideWindow
from safeloop.checks.update.closure import ClosureComputesNothing
from safeloop.checks.update.empty_steps import ClosureDiscardsGradients, SteppedAgain, StepWithoutGradients
from safeloop.checks.update.freezing import FrozenButMoving, FrozenDuringTraining
from safeloop.checks.update.half import HalfWithoutScaler, LossNotScaled
from safeloop.checks.update.no_effect import StepChangesNothing
from safeloop.checks.update.overwritten import TrainedAndOverwritten
from safeloop.checks.update.rates import RateSetNowhere
from safeloop.checks.update.scaling import ClippedWhileScaled, ScaledUpdate, ScaleUpdatedTooEarly
from safeloop.checks.update.schedule_first import ScheduleMovedFirst
from safeloop.checks.update.schedule_order import LearningRateZero, ScheduleBeforeStep
from safeloop.checks.update.schedule_owner import ScheduleOfAnotherOptimizer
from safeloop.checks.update.schedules import ScheduledTwice, ScheduleRunsOver
from safeloop.checks.update.sharing import ClosureKeepsGradients, GradientsMixed, LossCountedTwice
from safeloop.checks.update.skipped import EveryUpdateSkipped
from safeloop.checks.update.steps import OptimizerNeverSteps, UpdatedWithoutPart
from safeloop.checks.update.strangers import LeafOfNobody
from safeloop.checks.update.tails import TailDiscarded
from safeloop.checks.update.thawed import ThawedWithTheRest
from safeloop.checks.update.thrown_away import UpdateThrownAway
from safeloop.checks.update.unowned import GradientsForNobody
from safeloop.checks.update.windows import TailWindow, UnevenMicroBatches
from safeloop.checks.update.zeroing import GradientsDiscarded, GradientsNotZeroed
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
    FreezeWithoutEffect,
    CopyIsTheOriginal,
    TiedByCopy,
    LearningRatesFarApart,
    BackwardOfModule,
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
    TermContainsAnother,
    OperationWithoutSecondDerivative,
)
_GRADIENTS = (TermIsNotFinite, NonFiniteGradient)


def setup_faults(view: SetupView) -> list[Fault]:
    """What is wrong with the model and its owners, before the first forward; errors first, then the most specific.

    Call it before any forward pass of the run, since a state that a forward keeps is not yet there. Cost: a walk over
    the modules; the methods' bytecode is read only where something was found.
    """
    return _errors_first(fault for check in _SETUP for fault in check.find(view))


def loop_setup_faults(view: SetupView) -> list[Fault]:
    """The same for a loop that is not ours, where the loop must show that it matters who owns what.

    See `GradientsForNobody` and `LoopOwners`. What looks like an optimizer over a copy of the model is told at once.
    """
    faults = setup_faults(view)
    later = {check.code for check in (UnownedParameter, StaleOptimizer, ParameterOwnedTwice, NothingToTrain)}
    told = [fault for fault in faults if fault.code not in later]
    if not is_stale(view):
        return told
    unowned = view.ownership.unowned
    trainable = sum(parameter.requires_grad for parameter in view.model.parameters())
    stale = [fault for fault in faults if fault.code == StaleOptimizer.code]
    return [*stale, UnownedParameter.in_a_loop(unowned, trainable, list(view.optimizers)), *told]


def term_faults(view: TermsView) -> list[Fault]:
    """What is wrong with the returned loss terms, by type, shape and graph; errors first, then the most specific.

    Nothing is read from the device on a healthy step. Cost: about 2 us for each node of each term's graph.
    """
    return _errors_first(fault for check in _TERMS for fault in check.find(view))


def gradient_faults(view: GradientsView) -> list[Fault]:
    """Which loss terms and gradients are not finite, terms first. It reads every gradient: only for a bad norm."""
    return [fault for check in _GRADIENTS for fault in check.find(view)]


def history_faults(view: History, *, is_over: bool) -> list[Fault]:
    """What the gradients of the steps that were looked at show together; nothing is read from the device.

    What may change later in a healthy run, such as a weight that is zero at first or a head that is used later, is told
    when the history is looked at again, and has not moved, or when the run is over.
    """
    view.is_late = is_over or view.windows > 1
    checks = (NoGradient, AlwaysZero, SampleWithoutGradient, VanishingGradient, ExplodingGradient)
    found = [fault for check in checks for fault in check.find(view)]
    return _errors_first([*found, *TermAlwaysZero.find(view)] if is_over else found)


def trainer_call_checks(model: nn.Module, frozen: frozenset[int]) -> list[CallCheck]:
    """The checks that hear calls of torch functions; `frozen` are ids of the parameters frozen from the start."""
    return [
        BroadcastInLoss(),
        ProbabilitiesAsLogits(),
        NormalisedOverAnother(),
        PenaltyWithoutGraph(),
        PartOfSumWithoutGradient(),
        PenaltyThroughBatchNorm(),
        DerivativeVanishes(),
        CheckpointRunsTwice(),
        SampleWithoutGradient(),
        GradientOfNonLeaf(),
        StraightThroughReversed(),
        StatisticsLeftBehind(),
        FrozenStatistics(model, frozen),
        DataChangedInPlace(),
        LayerMadeInForward(model),
    ]


def call_checks(model: nn.Module, frozen: frozenset[int]) -> list[CallCheck]:
    """The same for a loop that is not ours, which evaluates by itself."""
    return [
        *trainer_call_checks(model, frozen),
        DropoutInEvaluation(),
        StatisticsFromValidation(),
        EveryUpdateSkipped(),
        LeftInEvalMode(model),
        GradModeLeftOff(),
        TrainedAndOverwritten(model),
        LeafOfNobody(model),
        HalfWithoutScaler(),
        StepChangesNothing(),
        CopyOfItself(model),
        NonFiniteGradient(),
        UpdateThrownAway(model),
        AverageGoesBackwards(model),
        ThawedWithTheRest(model),
        FrozenDuringTraining(model),
        BufferMovesInEvaluation(model),
        EvaluatedInTrainMode(model),
    ]


def event_checks(model: nn.Module) -> list[EventCheck]:
    """The checks of the order of events in a loop that is not ours."""
    return [
        LoopOwners(model),
        GradientsNotZeroed(),
        GradientsDiscarded(),
        StepWithoutGradients(),
        SteppedAgain(),
        GradientsMixed(),
        LossCountedTwice(),
        ClosureKeepsGradients(),
        OptimizerNeverSteps(),
        UpdatedWithoutPart(),
        GradientsForNobody(model),
        FrozenButMoving(),
        LateFreezing(model),
        ClippedWhileScaled(),
        ScaledUpdate(),
        ScaleUpdatedTooEarly(),
        ClipWithoutEffect(),
        ClippedInsideWindow(),
        ScheduleBeforeStep(),
        ScheduleMovedFirst(),
        ScheduleOfAnotherOptimizer(),
        LearningRateZero(),
        UnevenMicroBatches(),
        TailWindow(),
        TailDiscarded(),
        LossNotScaled(),
        GroupRateZero(),
        ClosureDiscardsGradients(),
        ClosureComputesNothing(),
        RateSetNowhere(),
        GroupKeyIgnored(),
        ScheduledTwice(),
        ScheduleRunsOver(),
        TrainedInEvaluation(model),
        SwitchedOffByEvaluation(model),
    ]


def _errors_first(faults: Iterable[Fault]) -> list[Fault]:
    return sorted(faults, key=lambda fault: fault.severity != "error")
