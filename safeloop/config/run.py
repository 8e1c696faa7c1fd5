"""The tree of a run's config: each section is a component, each field a key of the YAML."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from safeloop.checks.config.run import BadRunName
from safeloop.checks.registry import FILES
from safeloop.component import Bool, Component, Float, Int
from safeloop.config.inputs import BatchPath, InputPath
from safeloop.config.losses import INPUTS, AnyLoss
from safeloop.data.config import DataConfig
from safeloop.optim.averaging import AnyAverage
from safeloop.optim.balancing import BalanceSpec
from safeloop.optim.combining import AnyCombine
from safeloop.optim.specs import AnyOptimizer
from safeloop.penalties.union import AnyPenalty
from safeloop.sinks.union import SinkName, SinkSpec
from safeloop.target import TargetSpec, resolve_target

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_OPTIMIZER_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_TERM_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,63}")


def _run_name(name: str) -> str:
    if not _RUN_NAME.fullmatch(name):
        raise PydanticCustomError(BadRunName.code, "{name} is no plain folder name", {"name": repr(name)})
    return name


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", name):
        message = "{name} is no device; write auto, cpu, cuda or cuda:0"
        raise PydanticCustomError("bad_name", message, {"name": repr(name)})
    return name


def _optimizer_name(name: str) -> str:
    if not _OPTIMIZER_NAME.fullmatch(name) or name == "total":
        why = "`total` stands for all optimizers" if name == "total" else "letters, digits, `_` and `-` only"
        raise PydanticCustomError(
            "bad_name", "{name} cannot name an optimizer: {why}", {"name": repr(name), "why": why}
        )
    return name


def _term_name(name: str) -> str:
    if not _TERM_NAME.fullmatch(name) or name in ("train", "eval"):
        why = f"`loss/{name}` is the total" if name in ("train", "eval") else "letters, digits and `_ . / -` only"
        raise PydanticCustomError("bad_name", "{name} cannot name a term: {why}", {"name": repr(name), "why": why})
    return name


def _known_code(code: str) -> str:
    if code not in FILES:
        raise PydanticCustomError("bad_name", "{code} is no code of a check", {"code": repr(code)})
    return code


def _named(optimizers: Any) -> Any:
    kinds = [optimizers.get(key) for key in ("type", "target")] if isinstance(optimizers, dict) else []
    return {"main": optimizers} if any(isinstance(kind, str) for kind in kinds) else optimizers


def _sink(sink: Any) -> Any:
    return {"type": sink} if isinstance(sink, str) else sink


OptimizerName = Annotated[str, AfterValidator(_optimizer_name)]
TermName = Annotated[str, AfterValidator(_term_name)]
GradNorm = Literal["total", "owner", "module", "loss_at_cut"]
PhaseName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
CheckCode = Annotated[str, AfterValidator(_known_code)]
Optimizers = Annotated[
    dict[OptimizerName, AnyOptimizer] | None,
    BeforeValidator(_named, json_schema_input_type=AnyOptimizer | dict[OptimizerName, AnyOptimizer] | None),
]
RequiredOptimizers = Annotated[
    dict[OptimizerName, AnyOptimizer],
    BeforeValidator(_named, json_schema_input_type=AnyOptimizer | dict[OptimizerName, AnyOptimizer]),
]
Sink = Annotated[SinkSpec, BeforeValidator(_sink, json_schema_input_type=SinkName | SinkSpec)]


class CompileSection(Component):
    """How torch compiles the model."""

    backend: str = "inductor"
    """a backend of `torch.compile`: inductor needs a C++ compiler, eager and aot_eager only trace"""


class RunSection(Component):
    """How long, where and from which seed."""

    name: Annotated[str, AfterValidator(_run_name)] | None = None
    """name of the run's folder; null: derived from the config. A second run of a name gets `name-2`"""
    dir: Path = Path("runs")
    """folder that holds the runs, from the current directory"""
    seed: Int = Field(default=0, ge=0, lt=2**63)
    """seed of weights, data order and everything else that is drawn"""
    max_steps: Int | None = Field(default=None, ge=0, lt=2**63)
    """stop after this many steps; this or max_epochs is required, the first reached ends the run"""
    max_epochs: Int | None = Field(default=None, ge=0, lt=2**63)
    """stop after this many passes over the training data"""
    device: Annotated[str, AfterValidator(_device)] = "auto"
    """auto (CUDA where there is one), cpu, cuda or cuda:N"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """number format of the forward: bf16 and fp16 by autocast, fp16 with a gradient scale"""
    compile: Bool | CompileSection = False
    """compile the model in place before training: true, or a section that names the backend"""

    @property
    def compile_backend(self) -> str | None:
        """The backend that compiles the model; None: it is not compiled."""
        if isinstance(self.compile, bool):
            return CompileSection().backend if self.compile else None
        return self.compile.backend


class TrainerSection(Component):
    """The subclass of `safeloop.Trainer` that computes the losses. It is made with this config and nothing else."""

    target: str
    """`package.module:Class`; the module must be allowed"""

    def resolve(self, base: type[Any], allow: Collection[str]) -> type[Any]:
        """The class; see `safeloop.target.resolve_target`."""
        return resolve_target(self.target, base, allow)


class ModelSection(TargetSpec):
    """The model of a run that is not given in code."""

    inputs: tuple[BatchPath, ...] | None = Field(default=None, min_length=1)
    """paths into the batch that a config-only run calls it with; null: the batch if a tensor, else its first element"""


class MetricSection(TargetSpec):
    """A metric of a run without a Trainer subclass."""

    inputs: tuple[InputPath, ...] = Field(default=INPUTS, min_length=1)
    """paths into the batch and the model's output, in the order of the call"""


class NonFiniteSection(Component):
    """What happens when a loss or gradient is NaN or infinite. It never reaches a parameter."""

    policy: Literal["raise", "skip"] = "raise"
    """raise: the run stops with a fault; skip: the update is left out and counted"""
    max_consecutive: Int | None = Field(default=None, ge=1)
    """with skip: this many skips in a row stop the run"""
    save_bundle: Bool = True
    """write a step that was refused or (except for the first) that failed into the run folder, `bundles/step-N`, for
    `safeloop replay`: as large as the weights"""


class AuditSection(Component):
    """How much is checked while training."""

    level: Literal["off", "standard", "full"] = "standard"
    """standard: what costs nothing, and the first steps in depth; full: every check on every step"""
    budget: Float | None = Field(default=0.01, ge=0, le=1)
    """share of the step time that deep checks may cost after the first 20 steps; null: every step is looked at"""
    accept: dict[CheckCode, tuple[str, ...]] = Field(default_factory=dict)
    """code -> name patterns whose faults are accepted, visible in the plan"""


class AccumulateSection(Component):
    """How many micro-batches make one update."""

    micro_batches: Int = Field(default=1, ge=1)
    """forward and backward run for so many before an update; fewer where an epoch ends"""
    weight_by: Literal["samples", "tokens", "batches"] = "samples"
    """what a micro-batch counts by: its samples, its tokens (`count_tokens` of the Trainer), or each the same"""


class PhaseSection(Component):
    """A phase: what it trains and when. Overrides what `@phase` says."""

    trains: tuple[str, ...] | None = Field(None, min_length=1)
    """names of the optimizers that it updates; null: what `@phase` says"""
    repeat: Int | None = Field(None, ge=1)
    """turns in a step, each with fresh micro-batches; null: what `@phase` says"""
    every: Int | None = Field(None, ge=1)
    """runs on the steps that this divides; null: what `@phase` says"""
    losses: tuple[str, ...] | None = Field(None, min_length=1)
    """config-only runs: names of the losses and penalties that it computes"""


class StageSection(Component):
    """A part of the run with optimizers of its own, whose states and schedules start when it starts.

    Steps, epochs, data, logs, evaluations and the average go on from the stage before.
    """

    max_steps: Int = Field(ge=1, lt=2**63)
    """how many steps it lasts"""
    optimizers: RequiredOptimizers
    """one optimizer (a section with `type`, then named `main`), or several by name"""


class EvaluateSection(Component):
    """When the evaluation data is evaluated."""

    every: Int | None = Field(default=None, ge=1)
    """steps between evaluations; null: only at the end"""
    loss: Bool | None = None
    """whether to evaluate the loss terms too; null: where it is possible"""


class ExactNormsSection(Component):
    """How often each loss term's gradient norm is measured exactly, over all parameters: `loss_grad_exact/<term>`.

    Cost on such a step: about one more backward pass for each term. With four terms, every 50 steps, that is about 8 %
    of all time in backward passes.
    """

    every: Int = Field(ge=1)
    """steps between two measurements; a multiple of `log.every` leaves none unwritten"""


class CurvatureSection(Component):
    """Readings of the Hessian of each phase's loss: `curvature/<phase>/<reading>`.

    They are taken at the logs that come every `every` steps, on the first micro-batch of the run and with the same
    random numbers each time: they compare weights, not data. Cost of each: a forward and a backward pass that records
    itself, then about two gradients for each of `products` products, and as many directions in memory for the
    eigenvalue.
    """

    every: Int = Field(ge=1)
    """steps between two readings; they wait for the next log"""
    of: tuple[Literal["top_eigenvalue", "trace"], ...] = Field(default=("top_eigenvalue", "trace"), min_length=1)
    """top_eigenvalue: the largest, by Lanczos; above 2 / lr, plain gradient descent is unstable. trace: Hutchinson's"""
    products: Int = Field(default=10, ge=1)
    """Hessian-vector products for each reading: more are more exact"""


class LogSection(Component):
    """What is written down, how often and where."""

    every: Int = Field(default=50, ge=1)
    """steps between records"""
    grad_norms: tuple[GradNorm, ...] = ("total", "owner", "module", "loss_at_cut")
    """gradient norms: of everything, per optimizer, per module, per loss term at the features that terms share"""
    exact_term_norms: ExactNormsSection | None = None
    """gradient norms per loss term over all parameters, exact: about one backward pass per term; null: none"""
    watch: tuple[str, ...] = ()
    """patterns of modules: the gradient norm at their outputs is logged as `watch/<module>`, on the steps that log"""
    curvature: CurvatureSection | None = None
    """readings of the loss's Hessian, on a schedule; null: none"""
    sinks: tuple[Sink, ...] = Field(default=("tensorboard", "console", "jsonl"), validate_default=True)
    """where records go: names, or sections with a `type`"""


class RunConfig(Component):
    """Everything that a config file can say."""

    run: RunSection = RunSection()
    """how long, where, from which seed"""
    trainer: TrainerSection | None = None
    """your subclass of `safeloop.Trainer`; null: losses and metrics are given here"""
    model: ModelSection | None = None
    """the model, if it is not given in code"""
    data: DataConfig | None = None
    """training and evaluation data"""
    optimizers: Optimizers = None
    """one optimizer (a section with `type`, then named `main`), or several by name"""
    stages: dict[PhaseName, StageSection] = Field(default_factory=dict)
    """parts of the run in order, each with optimizers of its own, in place of `optimizers`"""
    frozen: tuple[str, ...] = ()
    """patterns of parameters that nobody trains"""
    losses: dict[TermName, AnyLoss] = Field(default_factory=dict)
    """loss terms by name"""
    penalties: dict[TermName, AnyPenalty] = Field(default_factory=dict)
    """loss terms that are made of gradients, by name"""
    metrics: dict[TermName, MetricSection] = Field(default_factory=dict)
    """metrics by name, for runs without a Trainer subclass"""
    phases: dict[PhaseName, PhaseSection] = Field(default_factory=dict)
    """phases by name, in order, each with losses and optimizers of its own"""
    simultaneous: Bool = False
    """each loss term trains only what its `trains` names, from one forward; all updates after all backward passes"""
    combine: AnyCombine | None = None
    """how the gradients of conflicting loss terms become one, for every phase with several; null: their sum"""
    balance: BalanceSpec | None = None
    """weights of loss terms that follow the sizes of their gradients; null: they stay as `losses` says"""
    accumulate: AccumulateSection = AccumulateSection()
    """micro-batches per update"""
    nonfinite: NonFiniteSection = NonFiniteSection()
    """what happens on NaN and infinity"""
    average: AnyAverage | None = None
    """an average of the weights over steps, evaluated and saved beside the live ones; null: none"""
    audit: AuditSection = AuditSection()
    """how much is checked"""
    evaluate: EvaluateSection = EvaluateSection()
    """when to evaluate"""
    log: LogSection = LogSection()
    """what is recorded"""

    @property
    def max_steps(self) -> int | None:
        """Steps at most: of the run, or of its stages together, whichever ends first; None: no limit."""
        of_stages = [sum(stage.max_steps for stage in self.stages.values())] if self.stages else []
        return min([*of_stages, *([] if self.run.max_steps is None else [self.run.max_steps])], default=None)

    @property
    def all_optimizers(self) -> tuple[AnyOptimizer, ...]:
        """The specs of every stage, or of the run."""
        sections = [stage.optimizers for stage in self.stages.values()] if self.stages else [self.optimizers or {}]
        return tuple(spec for section in sections for spec in section.values())
