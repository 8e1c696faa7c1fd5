"""`custom_step`: the escape hatch for what no plan can say; its operations are recorded and obey a plan's facts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from safeloop.autograd.walk import reach
from safeloop.checks.update.custom import CustomStepRefused
from safeloop.checks.update.order import StepOutOfOrder
from safeloop.faults import FaultError
from safeloop.plan import Clip, Finite, Node, Phase, StepPlan, Term, Unscale, Update, Zero
from safeloop.plan.custom import CustomBackward, CustomStep
from safeloop.plan.node import Fact, facts
from safeloop.step.bind import Operation, Parts, bind
from safeloop.step.finite import ImmediateGate
from safeloop.step.precision import Precision
from safeloop.step.report import Frame, StepReport

NAME = "custom_step"
CustomMethod = Callable[["Operations", Any], None]


class Operations:
    """What a `custom_step` may do. Each call is recorded in `record`, and refused where a plan could not have it.

    In fp16, `.grad` holds scaled gradients between `backward` and `update`.
    """

    def __init__(
        self, parts: Parts, draw: Callable[[], Any], report: StepReport, *, is_audited: bool, wants_modules: bool
    ) -> None:
        self.owners: tuple[str, ...] = tuple(parts.owners)
        """the names of the optimizers"""
        self.nodes: list[Node] = []
        self.is_over = False
        self._parts = parts
        self._draw = draw
        self._report = report
        self._is_audited = is_audited
        self._wants_modules = wants_modules
        self._reader = parts.readers[NAME]
        self._held: set[Fact] = set()
        self._terms: dict[str, Tensor] = {}
        self._used: set[str] = set()
        self._is_cast = parts.precision.format == "fp32"
        self._bound: dict[Node, Operation] = {}

    @property
    def record(self) -> list[str]:
        """What was done in this step so far: a line for each operation."""
        return [f"{node.verb} {node.subject}" for node in self.nodes]

    def draw(self) -> Any:
        """A fresh micro-batch."""
        self._refuse_when_over("draw")
        return self._draw()

    def autocast(self) -> AbstractContextManager[object]:
        """A region for one forward in the number format of the run."""
        self._is_cast = True
        return self._parts.precision.autocast()

    def zero(self, *owners: str) -> None:
        """Forget the gradients of some owners; of all, if none is named."""
        names = self._named("zero", owners)
        self._perform(Zero(names), Frame(self._report))
        self._terms.clear()
        self._used -= set(names)

    def backward(self, terms: Mapping[str, Any], *, retain_graph: bool = False, accumulate: bool = False) -> None:
        """Add the gradients of loss terms, weighted as the config says, to `.grad`, in one pass.

        Args:
            terms: name -> loss term, as `losses` returns them.
            retain_graph: whether a further pass goes through the same graph.
            accumulate: whether the gradients are meant to be added to what is there already.

        Raises:
            FaultError: SL4, a term is wrong; SL601, it reaches an owner that is not zeroed since its last gradients.
        """
        self._refuse_when_over("backward")
        if not isinstance(terms, Mapping):
            raise self._refused(
                f"`backward` was given a {type(terms).__name__}", "give it a dict: term name -> loss term"
            )
        if not self._is_cast:
            raise self._refused(
                f"`backward` without a forward in `ops.autocast()`, and the run is in {self._parts.precision.format}",
                "open `with ops.autocast():` around each forward",
            )
        frame = Frame(self._report, source=self._reader.rules.source)
        self._read(terms, frame)
        if not frame.roots:
            return
        owners = self._reached(frame.roots)
        if accumulate and self._parts.precision.scale is not None and (old := sorted(self._used & set(owners))):
            raise self._refused(
                f"scaled gradients would be added to those of `{old[0]}`, which are unscaled already", "zero them first"
            )
        weights = self._reader.rules.weights
        planned = tuple(Term(name, weights.get(name, 1.0)) for name in frame.root_names)
        self._note(CustomBackward(planned, owners, retain_graph, accumulate))
        scale = self._parts.precision.scale
        seeds = frame.seeds if scale is None else scale.scaled(frame.seeds)
        torch.autograd.backward(frame.roots, seeds, retain_graph=retain_graph)

    def update(self, *owners: str) -> bool:
        """Unscale, check to be finite, clip and update some owners, all or none; of all, if none is named.

        Returns:
            False where a non-finite gradient kept them from it (`nonfinite.policy: skip`).

        Raises:
            FaultError: SL601, an owner has no gradients of this step; SL501, they are not finite.
        """
        names = self._named("update", owners)
        parts = self._parts
        bound = {name: parts.owners[name] for name in names}
        updates = [Update(name, owner.kind, owner.clipping is not None) for name, owner in bound.items()]
        if missing := facts("gradients", *names) - self._held:
            raise self._out_of_order(updates[0], missing)
        is_scaled = parts.precision.scale is not None
        nodes: list[Node] = [Unscale(names)] if is_scaled else []
        waits = not parts.gate.is_deferred and any(owner.tensors[0].device.type != "cpu" for owner in bound.values())
        nodes.append(Finite(names, parts.gate.policy, parts.gate.is_deferred, is_scaled, waits))
        nodes += [Clip(name, *owner.limit) for name, owner in bound.items() if owner.limit is not None]
        frame = Frame(self._report, source=self._reader.rules.source, wants_modules=self._wants_modules)
        frame.terms = dict(self._terms)
        for node in [*nodes, *updates]:
            self._perform(node, frame)
        self._used |= set(names)
        self._report.num_skipped += frame.is_skipped
        return not frame.is_skipped

    def _read(self, terms: Mapping[str, Any], frame: Frame) -> None:
        step = self._report.step
        returned = self._reader.due(terms, step, is_audited=self._is_audited)
        self._parts.observer.faults(self._reader.penalties.taken(), step)
        is_plain = self._reader.read(returned, frame)
        if not is_plain or self._is_audited:
            self._parts.observer.faults(self._reader.faults(returned, is_first=False), step)
        if not is_plain:
            self._reader.read_unusual(returned, frame)
        self._terms |= frame.terms
        self._report.terms |= frame.terms
        self._report.inactive |= dict.fromkeys(frame.inactive, 1.0)

    def _reached(self, roots: list[Tensor]) -> tuple[str, ...]:
        reached = [reach(root) for root in roots]
        leaves = {id(leaf) for one in reached for leaf in one.leaves}
        sees_all = all(one.is_complete for one in reached)
        owners = self._parts.owners.items()
        return tuple(n for n, owner in owners if not sees_all or any(id(tensor) in leaves for tensor in owner.tensors))

    def _perform(self, node: Node, frame: Frame) -> None:
        self._note(node)
        if node not in self._bound:
            self._bound[node] = bind(node, self._parts)
        self._bound[node](frame)

    def _note(self, node: Node) -> None:
        """Record an operation that may be done now."""
        if missing := node.needs - self._held:
            raise self._out_of_order(node, missing)
        self._held = (self._held - node.voids) | node.gives
        self.nodes.append(node)

    def _named(self, operation: str, owners: tuple[str, ...]) -> tuple[str, ...]:
        self._refuse_when_over(operation)
        if strangers := [name for name in owners if name not in self.owners]:
            near = get_close_matches(str(strangers[0]), self.owners, 1)
            raise self._refused(
                f"`{operation}` names `{strangers[0]}`; the optimizers are {', '.join(self.owners)}",
                (f"did you mean `{near[0]}`? " if near else "") + "name optimizers of the `optimizers:` section",
            )
        return tuple(dict.fromkeys(owners)) or self.owners

    def _refuse_when_over(self, operation: str) -> None:
        if self.is_over:
            raise self._refused(f"`{operation}` was called after the step had ended", "keep no `ops` beyond its step")

    def _refused(self, what: str, fix: str) -> FaultError:
        return CustomStepRefused.error(what, where=self._reader.rules.source, fix=fix)

    def _out_of_order(self, node: Node, missing: frozenset[Fact]) -> FaultError:
        done = "; ".join(self.record) or "nothing"
        owners = ", ".join(f'"{fact.subject}"' for fact in sorted(missing))
        return StepOutOfOrder.error(
            f"`{node.verb}` stands where what it needs does not hold; missing: {'; '.join(map(str, sorted(missing)))}",
            where=f"{self._reader.rules.source}, operation {len(self.nodes) + 1}: {node.verb} {node.subject}",
            why=f"{node.why}. Done before: {done}",
            fix=f"call `ops.zero({owners})` before it, or give it `accumulate=True` where the gradients are to add up"
            if isinstance(node, CustomBackward)
            else "call `ops.backward` on a term that reaches it before",
        )


class CustomRun:
    """A `custom_step` on live objects."""

    def __init__(self, method: CustomMethod, parts: Parts) -> None:
        self._method = method
        self._parts = parts
        if closures := [name for name, owner in parts.owners.items() if owner.needs_closure]:
            raise CustomStepRefused.error(
                f"`{closures[0]}` is LBFGS, which needs a closure",
                where=f"optimizers.{closures[0]}",
                fix="write a `loss` instead of a `custom_step`, or train with another optimizer",
            )

    def __call__(
        self, draw: Callable[[], Any], report: StepReport, *, is_audited: bool = False, wants_modules: bool = False
    ) -> None:
        """One step; where an update is refused, buffers are as they were when the step of that update began."""
        if self._parts.keeper is not None:
            self._parts.keeper.keep()
        ops = Operations(self._parts, draw, report, is_audited=is_audited, wants_modules=wants_modules)
        watch = self._parts.watch
        with watch.on(report, object()) if watch is not None and wants_modules else nullcontext():
            self._run(ops, draw(), report.step)

    def rehearse(self, batch: Any, model: nn.Module) -> list[Node]:
        """What the step would do for a batch: every check, no update, no draw; parameters are then as before."""
        parts = _rehearsing(self._parts)
        ops = _Rehearsal(parts, lambda: batch, StepReport(0), is_audited=True, wants_modules=False)
        saved = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
        try:
            self._run(ops, batch, 0)
        finally:
            with torch.no_grad():
                for parameter, values in saved:
                    if not torch.equal(parameter, values):
                        parameter.copy_(values)
        return ops.nodes

    def _run(self, ops: Operations, batch: Any, step: int) -> None:
        self._parts.readers[NAME].weigh(step)
        try:
            self._method(ops, batch)
        finally:
            ops.is_over = True


class _Rehearsal(Operations):
    """Updates nothing."""

    def _perform(self, node: Node, frame: Frame) -> None:
        if isinstance(node, Update):
            self._note(node)
        else:
            super()._perform(node, frame)


def _rehearsing(parts: Parts) -> Parts:
    """With a gate and a gradient scale of its own; whoever rehearses puts the buffers back."""
    device = next(tensor.device for owner in parts.owners.values() for tensor in owner.tensors)
    gate, precision = ImmediateGate(policy=parts.gate.policy), Precision(parts.precision.format, device)
    return replace(parts, gate=gate, precision=precision, keeper=None)


def custom_plan(plan: StepPlan, owners: tuple[str, ...], record: list[Node] | None = None) -> StepPlan:
    """The plan of a run with a custom step, with what a rehearsal recorded."""
    nodes = (CustomStep(owners, record is not None), *(record or ()))
    updated = tuple(name for name in owners if any(isinstance(n, Update) and n.owner == name for n in nodes))
    return replace(plan, phases=(Phase(NAME, nodes, updated),))


def refuse_accumulation(micro_batches: int) -> None:
    """A custom step draws its own micro-batches.

    Raises:
        FaultError: SL616, the config wants several.
    """
    if micro_batches > 1:
        raise CustomStepRefused.error(
            f"`accumulate.micro_batches` is {micro_batches}, and a custom step draws its own",
            where="accumulate.micro_batches",
            fix="set it to 1; call `ops.draw()`, and `ops.backward(terms, accumulate=True)`, as often as it takes",
        )
