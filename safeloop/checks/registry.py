"""Every code and the file that defines it: a literal table, which `safeloop explain` reads without torch.

A code is never reused. A test compares the table with the classes.
"""

from __future__ import annotations

FILES: dict[str, str] = {
    # SL1: config and target
    "SL101": "config/keys.py",  # UnknownKey
    "SL102": "config/keys.py",  # MissingKey
    "SL103": "config/values.py",  # WrongType
    "SL104": "config/values.py",  # ValueOutOfRange
    "SL105": "config/keys.py",  # UnknownType
    "SL106": "config/document.py",  # DuplicateKey
    "SL107": "config/document.py",  # UnreadableYaml
    "SL108": "config/document.py",  # MissingFile
    "SL109": "config/document.py",  # BadOverride
    "SL110": "config/target.py",  # TargetNotAllowed
    "SL111": "config/target.py",  # TargetNotFound
    "SL112": "config/target.py",  # TargetOfWrongClass
    "SL113": "config/target.py",  # TargetArguments
    "SL114": "config/values.py",  # ArgumentsRefused
    "SL115": "config/values.py",  # SuspiciousValue (warning)
    "SL116": "config/run.py",  # BadRunName
    "SL117": "config/run.py",  # NoLoss
    "SL118": "config/run.py",  # LossAndLosses
    "SL119": "config/run.py",  # BadInputPath
    "SL120": "config/training.py",  # ClippedTwice
    "SL121": "config/training.py",  # AverageNeverTaken
    "SL122": "config/training.py",  # ScheduleNeverMoves
    "SL130": "config/combine.py",  # PackageMissing
    "SL131": "config/combine.py",  # CombineRefused
    # SL2: parameters and ownership
    "SL201": "setup/ownership.py",  # UnownedParameter
    "SL202": "setup/ownership.py",  # ParameterOwnedTwice
    "SL203": "setup/patterns.py",  # PatternMatchesNothing
    "SL204": "setup/optimizers.py",  # StaleOptimizer
    "SL205": "setup/optimizers.py",  # NothingToTrain
    "SL206": "setup/attributes.py",  # PlainTensorAttribute
    "SL207": "setup/attributes.py",  # NonLeafAttribute
    "SL208": "setup/containers.py",  # ModulesInPlainContainer
    "SL209": "setup/ownership.py",  # ParameterAppearedLate
    "SL210": "setup/freezing.py",  # FreezeWithoutEffect (warning)
    "SL211": "setup/copies.py",  # TiedByCopy (warning)
    "SL212": "setup/sharing.py",  # CopyIsTheOriginal (warning)
    "SL213": "setup/rates.py",  # LearningRatesFarApart (warning)
    "SL214": "update/unowned.py",  # GradientsForNobody
    "SL215": "update/strangers.py",  # LeafOfNobody
    "SL216": "setup/rates.py",  # GroupRateZero (warning)
    "SL217": "setup/keys.py",  # GroupKeyIgnored (warning)
    "SL220": "setup/made_anew.py",  # LayerMadeInForward
    "SL221": "setup/uncalled.py",  # BackwardOfModule (warning)
    # SL3: graph and mutation
    "SL301": "graph/torch_errors.py",  # LeafChangedInPlace
    "SL302": "graph/torch_errors.py",  # GraphUsedTwice
    "SL303": "graph/saved.py",  # SavedTensorChanged
    "SL304": "graph/derivatives.py",  # InferenceTensor
    "SL305": "graph/derivatives.py",  # NoSecondDerivative
    "SL306": "graph/derivatives.py",  # TensorWithoutGraph
    "SL307": "graph/derivatives.py",  # GradientOfNonScalar
    "SL308": "graph/unseen.py",  # SavedTensorChangedUnseen
    "SL309": "graph/unseen.py",  # ParameterChangedUnseen
    "SL310": "graph/lifetime.py",  # GraphReachesBack
    "SL311": "graph/lifetime.py",  # GraphsKept
    "SL312": "graph/recomputed.py",  # CheckpointRunsTwice (warning)
    "SL313": "graph/functions.py",  # CustomGradientWrong (warning)
    "SL314": "graph/detached.py",  # PathCutByData (warning)
    "SL315": "graph/leaves.py",  # GradientOfNonLeaf
    "SL316": "graph/recomputed.py",  # RecomputedOtherwise
    "SL317": "graph/samples.py",  # SampleWithoutGradient (warning)
    "SL318": "graph/itself.py",  # CopyOfItself (warning)
    "SL319": "graph/functions_twice.py",  # SecondDerivativeOfFunctionWrong (warning)
    "SL330": "graph/straight_through.py",  # StraightThroughReversed
    "SL331": "graph/discarded.py",  # FunctionResultDiscarded (warning)
    # SL4: loss terms and penalties
    "SL401": "terms/values.py",  # TermIsNotATensor
    "SL402": "terms/kinds.py",  # TermIsAPythonNumber
    "SL403": "terms/values.py",  # TermIsNotScalar
    "SL404": "terms/graph.py",  # TermHasNoGradientPath
    "SL405": "terms/kinds.py",  # TermIsNotFinite
    "SL406": "terms/kinds.py",  # TermIsNotFloatingPoint
    "SL407": "terms/declared.py",  # DeclaredTermMissing
    "SL408": "terms/values.py",  # TermWeightsOfWrongShape
    "SL409": "terms/graph.py",  # TermIgnoresTheModel
    "SL410": "terms/graph.py",  # TermReachesWhatItDoesNotTrain
    "SL411": "terms/simultaneous.py",  # TermWithoutTrains
    "SL412": "terms/simultaneous.py",  # TermReachesNothingItTrains
    "SL413": "terms/phases.py",  # PhaseReachesNothing
    "SL415": "terms/never.py",  # TermNeverActive (warning)
    "SL420": "terms/misuse.py",  # BroadcastInLoss (warning)
    "SL421": "terms/misuse.py",  # ProbabilitiesAsLogits (warning)
    "SL422": "terms/hand_made.py",  # PenaltyWithoutGraph
    "SL423": "terms/hand_made.py",  # PenaltyThroughBatchNorm (warning)
    "SL424": "gradients/flow.py",  # TermAlwaysZero (warning)
    "SL425": "terms/sums.py",  # PartOfSumWithoutGradient (warning)
    "SL426": "terms/contained.py",  # TermContainsAnother (warning)
    "SL430": "penalties/declared.py",  # PenaltyNotDeclared
    "SL431": "penalties/declared.py",  # PenaltyMisdeclared
    "SL432": "penalties/point.py",  # PenaltyOfWrongShape
    "SL433": "penalties/point.py",  # PenaltyPointNotReached
    "SL434": "penalties/gradient.py",  # PenaltyWithoutGradient
    "SL435": "penalties/second.py",  # OperationWithoutSecondDerivative
    "SL436": "penalties/gradient.py",  # SamplesCoupled (warning)
    "SL437": "penalties/gradient.py",  # SecondDerivativeVanishes
    "SL438": "penalties/declared.py",  # PenaltyWithoutEffect (warning)
    "SL439": "penalties/declared.py",  # DeclaredPenaltyMissing
    "SL440": "penalties/unused.py",  # PenaltyNotInLoss (warning)
    "SL445": "terms/derivatives.py",  # DerivativeVanishes
    "SL446": "terms/derivatives.py",  # NothingToDerive
    "SL447": "setup/watch.py",  # WatchRefused
    "SL448": "setup/watch.py",  # CurvatureUnavailable (warning)
    "SL450": "terms/constants.py",  # ConstantPartOfLoss
    "SL460": "terms/normalised.py",  # NormalisedOverAnother
    "SL461": "terms/counted.py",  # PartCountedTwice (warning)
    "SL462": "terms/baselines.py",  # PolicyTrainsBaseline (warning)
    "SL463": "terms/numbers.py",  # NumberInLoss (warning)
    "SL464": "terms/unused.py",  # LossNeverUsed (warning)
    "SL465": "terms/nobody.py",  # PartTrainsNobody (warning)
    "SL466": "terms/chosen.py",  # ConstantAlwaysChosen (warning)
    # SL5: gradient values
    "SL501": "gradients/nonfinite.py",  # NonFiniteGradient
    "SL502": "gradients/flow.py",  # NoGradient
    "SL503": "gradients/flow.py",  # AlwaysZero (warning)
    "SL504": "gradients/magnitude.py",  # VanishingGradient (warning)
    "SL505": "gradients/magnitude.py",  # ExplodingGradient (warning)
    # SL6: update, optimizer and schedule
    "SL601": "update/order.py",  # StepOutOfOrder
    "SL602": "update/order.py",  # SkippedTooOften
    "SL603": "update/phases.py",  # PhaseTrainsNoOptimizer
    "SL604": "update/phases.py",  # OptimizerNeverTrained
    "SL605": "update/average.py",  # NonFiniteWeights
    "SL606": "update/average.py",  # ModelCannotBeCopied
    "SL610": "update/closure.py",  # ClosureRefused
    "SL611": "update/closure.py",  # ObjectiveNotFixed (warning)
    "SL612": "update/closure.py",  # TokensWithoutCount
    "SL613": "update/accumulation.py",  # AccumulationDiffers
    "SL614": "update/accumulation.py",  # NothingToCompare
    "SL615": "setup/compiling.py",  # CompileRefused
    "SL616": "update/custom.py",  # CustomStepRefused
    "SL617": "update/guards.py",  # GradientsTouched
    "SL618": "update/guards.py",  # StepOutsideThePlan
    "SL620": "update/combine.py",  # TermsShareNoFeatures
    "SL621": "update/combine.py",  # CombinationFailed
    "SL622": "update/combine.py",  # TermsInseparable
    "SL625": "config/stages.py",  # StagesRefused
    "SL626": "update/balance.py",  # NothingToBalance
    "SL630": "update/zeroing.py",  # GradientsNotZeroed
    "SL631": "update/zeroing.py",  # GradientsDiscarded
    "SL632": "update/empty_steps.py",  # StepWithoutGradients
    "SL633": "update/sharing.py",  # GradientsMixed
    "SL634": "update/sharing.py",  # LossCountedTwice (warning)
    "SL635": "update/steps.py",  # OptimizerNeverSteps
    "SL636": "update/steps.py",  # UpdatedWithoutPart (warning)
    "SL637": "update/sharing.py",  # ClosureKeepsGradients
    "SL638": "update/empty_steps.py",  # SteppedAgain (warning)
    "SL640": "update/clip_order.py",  # ClipWithoutEffect
    "SL641": "update/scaling.py",  # ClippedWhileScaled
    "SL642": "update/scaling.py",  # ScaledUpdate
    "SL643": "update/skipped.py",  # EveryUpdateSkipped
    "SL644": "update/scaling.py",  # ScaleUpdatedTooEarly
    "SL645": "update/schedule_order.py",  # ScheduleBeforeStep
    "SL646": "update/schedule_owner.py",  # ScheduleOfAnotherOptimizer (warning)
    "SL647": "update/schedule_order.py",  # LearningRateZero
    "SL648": "graph/lifetime.py",  # StaleCasts
    "SL649": "update/windows.py",  # UnevenMicroBatches (warning)
    "SL650": "update/freezing.py",  # FrozenDuringTraining (warning)
    "SL651": "update/freezing.py",  # FrozenButMoving (warning)
    "SL652": "update/windows.py",  # TailWindow (warning)
    "SL653": "update/half.py",  # LossNotScaled
    "SL654": "update/empty_steps.py",  # ClosureDiscardsGradients
    "SL655": "update/tails.py",  # TailDiscarded (warning)
    "SL656": "update/half.py",  # HalfWithoutScaler (warning)
    "SL657": "update/no_effect.py",  # StepChangesNothing (warning)
    "SL658": "update/schedules.py",  # ScheduledTwice (warning)
    "SL659": "update/schedules.py",  # ScheduleRunsOver (warning)
    "SL660": "update/rebuilt.py",  # OptimizerBuiltAgain (warning)
    "SL661": "update/rates.py",  # RateSetNowhere (warning)
    "SL662": "update/overwritten.py",  # TrainedAndOverwritten
    "SL663": "update/thawed.py",  # ThawedWithTheRest (warning)
    "SL670": "update/moved.py",  # MovedWithoutGradient (warning)
    "SL671": "update/thrown_away.py",  # UpdateThrownAway
    "SL672": "update/closure.py",  # ClosureComputesNothing
    "SL673": "update/backwards.py",  # AverageGoesBackwards
    "SL674": "update/rounded.py",  # UpdatesRoundAway (warning)
    "SL675": "update/masked.py",  # MaskedButMoving (warning)
    "SL676": "update/clip_windows.py",  # ClippedInsideWindow (warning)
    "SL680": "update/schedule_first.py",  # ScheduleMovedFirst (warning)
    # SL7: evaluation
    "SL701": "evaluation/metrics.py",  # BadMetric
    "SL702": "evaluation/statistics.py",  # StatisticsFromValidation
    "SL703": "evaluation/left_in_eval.py",  # LeftInEvalMode
    "SL704": "evaluation/dropout.py",  # DropoutInEvaluation (warning)
    "SL705": "evaluation/modes.py",  # ModeChangedInLoss (warning)
    "SL706": "evaluation/statistics.py",  # FrozenStatistics (warning)
    "SL707": "evaluation/modes.py",  # GradModeLeftOff
    "SL708": "evaluation/trained.py",  # TrainedInEvaluation
    "SL709": "evaluation/forgotten.py",  # EvaluatedInTrainMode (warning)
    "SL720": "evaluation/aliases.py",  # KeptStateIsLive (warning)
    "SL721": "evaluation/statistics.py",  # StatisticsLeftBehind (warning)
    "SL722": "evaluation/modes.py",  # GradModeChangedInMetrics (warning)
    "SL723": "evaluation/buffers.py",  # BufferMovesInEvaluation (warning)
    "SL724": "evaluation/switched_off.py",  # SwitchedOffByEvaluation (warning)
    # SL85: data and environment
    "SL851": "data/source.py",  # EmptyData
    "SL852": "data/source.py",  # BatchCannotMove
    "SL853": "data/source.py",  # DeviceMissing
    "SL854": "data/source.py",  # DataEndedEarly (warning)
    "SL855": "data/source.py",  # NotData
    "SL856": "data/source.py",  # RunFolderUnwritable
    "SL857": "data/source.py",  # DataEndedInsideAStep (warning)
    "SL861": "data/bundles.py",  # BundleDamaged
    "SL862": "data/bundles.py",  # BundleWithoutBatch
    "SL863": "data/bundles.py",  # BundleDoesNotFit
    "SL864": "data/bundles.py",  # BundleNeedsItsTrainer
    "SL865": "data/run_folder.py",  # RunFolderUnreadable
    "SL866": "data/changed.py",  # DataChangedInPlace
}
