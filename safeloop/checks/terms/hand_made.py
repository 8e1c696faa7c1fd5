"""Gradient penalties written by hand with `torch.autograd.grad`."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from safeloop.autograd.lineage import Mark
from safeloop.autograd.sites import Site
from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck
from safeloop.checks.graph.recomputed import updates_statistics
from safeloop.checks.source import at
from safeloop.checks.wording import listed
from safeloop.faults import Fault

_REDUCE = ("mean", "sum", "norm", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")
_SUMS = ["add", "__add__", "__radd__", "add_", "__iadd__", "sub", "__sub__", "__rsub__", "stack"]


class PenaltyWithoutGraph(CallCheck):
    """A gradient penalty is added to a loss, and was computed without create_graph.

    ## What it does
    Follows the results of `torch.autograd.grad(..., create_graph=False)` that a line of the user's called, and tells
    where a scalar made of them alone is added to a scalar that has a graph; also where a second derivative without a
    graph, of a first one with, is added to values that have one. Cost: none beyond the tape of calls.

    ## Why it is bad
    Without `create_graph=True` the gradients have no history. The penalty is part of the loss that is logged, and
    trains nothing: the model is not regularised at all.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            x = batch.clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.model(x).sum(), x)
            return self.model(batch).square().mean() + (slope.norm(dim=1) - 1).square().mean()

    sgd = {"type": "SGD", "lr": 0.1}
    model = nn.Sequential(nn.Linear(4, 8), nn.Softplus(), nn.Linear(8, 1))
    Run(model=model, data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            x = batch.clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.model(x).sum(), x, create_graph=True)
            return self.model(batch).square().mean() + (slope.norm(dim=1) - 1).square().mean()

    sgd = {"type": "SGD", "lr": 0.1}
    model = nn.Sequential(nn.Linear(4, 8), nn.Softplus(), nn.Linear(8, 1))
    Run(model=model, data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Pass `create_graph=True` to `torch.autograd.grad`, or let a Trainer do it by `self.penalty(...)`. Where the number
    is meant to be a constant, detach it (`slope.norm().detach()`): that says so and is not told.

    ## Source
    https://github.com/ooples/AiDotNet/issues/1844; documentation of `torch.autograd.grad`.
    """

    code = "SL422"
    title = "penalty without create_graph"
    hears = frozenset(("grad", "detach", *_SUMS, *_REDUCE))

    def __init__(self) -> None:
        self._told: set[str] = set()
        self._pending: dict[Site | None, Fault] = {}

    def hear(self, call: Call) -> Iterator[Fault]:
        """Where what comes from `autograd.grad(create_graph=False)` alone is added to what has a graph."""
        if call.name == "grad":
            self._mark(call)
            return
        if call.name == "detach":
            if any(mark.kind == "gradient" for mark in call.tape.marks_of(call.args[0])):
                call.tape.mark(call.out, Mark("constant", "detach", "", call.site, call.tape.module, 0))
            return
        if call.name in _REDUCE:
            yield from self._reduced(call)
            return
        # without grad mode nothing becomes part of a loss: what an optimizer does with gradients
        if len(call.tensors) < 2 or not call.grad_mode or not any(t.requires_grad for t in call.tensors):
            return
        for tensor in call.tensors:
            marks = {m.kind: m for m in reversed(list(call.tape.marks_of(tensor)))}
            mark = marks.get("second" if tensor.dim() else "gradient")
            if tensor.requires_grad or mark is None or "constant" in marks:
                continue
            place = at(mark.site, "torch.autograd.grad")
            if place not in self._told:
                self._told.add(place)
                fault = self._told_of(tensor, place, at(call.site, "the loss"))
                if tensor.dim():  # it may be meant for weights, which are detached: told where it becomes a loss
                    self._pending[call.site] = fault
                    call.tape.mark(call.out, Mark("joined", call.name, "", call.site, call.tape.module, 0))
                else:
                    yield fault

    def _reduced(self, call: Call) -> Iterator[Fault]:
        """Where values that a second derivative without a graph was added to become one number with a graph."""
        if not self._pending or not isinstance(call.out, Tensor) or call.out.dim() or not call.out.requires_grad:
            return
        marks = {mark.kind: mark for tensor in call.tensors for mark in call.tape.marks_of(tensor)}
        if "joined" in marks and "constant" not in marks:
            fault = self._pending.pop(marks["joined"].site, None)
            if fault is not None:
                yield fault

    @staticmethod
    def _mark(call: Call) -> None:
        """Mark derivatives with a graph, those without one, and those without one that are derivatives of the first."""
        outputs, inputs = tensors_at(call, 0, "outputs"), tensors_at(call, 1, "inputs")
        with_graph = bool(call.kwargs.get("create_graph"))
        if call.caller is None:
            return
        kinds = ["derivative" if with_graph else "gradient"]
        is_second = any(m.kind == "derivative" for t in outputs for m in call.tape.marks_of(t))
        if is_second and not with_graph and not any(call.tape.live(t) for t in inputs):
            kinds.append("second")
        for tensor in call.out if isinstance(call.out, tuple) else ():
            for kind in kinds if isinstance(tensor, Tensor) else ():
                call.tape.mark(tensor, Mark(kind, "grad", "", call.site, call.tape.module, 0))

    @classmethod
    def _told_of(cls, tensor: Tensor, place: str, added: str) -> Fault:
        is_scalar = not tensor.dim()
        what = "a penalty computed from" if is_scalar else "a second derivative from"
        value = f", value {float(tensor):.4g}" if is_scalar else ""
        return cls.fault(
            f"{what} torch.autograd.grad(..., create_graph=False) is added to "
            + ("the loss: it is a constant there" if is_scalar else "a part of the loss that has a graph, and has none")
            + value,
            where=f"{place}; added at {added}",
            why="without create_graph=True the gradients have no history: "
            + (
                "the penalty is part of the loss that is logged, and trains nothing"
                if is_scalar
                else "this part of the equation is a constant in the loss, and trains nothing"
            ),
            fix="pass create_graph=True to torch.autograd.grad, or let a Trainer do it by "
            + ("`self.penalty(...)`" if is_scalar else "`sl.derivatives(...)`"),
        )


class PenaltyThroughBatchNorm(CallCheck):
    """A gradient penalty per sample is taken through batch normalisation in train mode, which mixes the samples.

    ## What it does
    Follows the results of batch normalisation that uses the statistics of the batch, and tells where a gradient with
    respect to a batch of inputs is taken of them with `create_graph=True`. Cost: none beyond the tape of calls.

    ## Why it is bad
    Through batch statistics each output depends on every sample. What is penalised is then not the gradient of one
    output with respect to its own input, and the bound that the penalty is to enforce does not hold.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            x = batch.clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.model(x).sum(), x, create_graph=True)
            return self.model(batch).square().mean() + (slope.norm(dim=1) - 1).square().mean()

    sgd = {"type": "SGD", "lr": 0.1}
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Softplus(), nn.Linear(8, 1))
    Run(model=model, data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            x = batch.clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.model(x).sum(), x, create_graph=True)
            return self.model(batch).square().mean() + (slope.norm(dim=1) - 1).square().mean()

    sgd = {"type": "SGD", "lr": 0.1}
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Softplus(), nn.Linear(8, 1))
    Run(model=model, data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Use LayerNorm, GroupNorm or InstanceNorm in what is penalised, or put the normalisation into eval mode for the
    forward of the penalty.

    ## Source
    https://github.com/pytorch/pytorch/issues/4422; Gulrajani et al., "Improved Training of Wasserstein GANs", 2017,
    section 4: "No critic batch normalization".
    """

    code = "SL423"
    title = "penalty through batch normalisation"
    severity = "warning"
    hears = frozenset(("grad", "batch_norm"))

    def __init__(self) -> None:
        self._told: set[str] = set()

    def hear(self, call: Call) -> Iterator[Fault]:
        """Where a gradient with respect to a batch of inputs is differentiated again, through batch_norm."""
        tape = call.tape
        if call.name == "batch_norm":
            if updates_statistics(call) or call.kwargs.get("training") or (len(call.args) > 5 and call.args[5]):
                kind = type(tape.running).__name__ if tape.running is not None else "batch_norm"
                tape.mark(call.out, Mark("batch_norm", kind, "", call.site, tape.module, 0))
            return
        if not call.kwargs.get("create_graph"):
            return
        outputs, inputs = tensors_at(call, 0, "outputs"), tensors_at(call, 1, "inputs")
        if not any(t.dim() > 1 and len(t) > 1 and not tape.live(t) for t in inputs):
            return
        # what made the inputs, such as a generator, is not what is differentiated
        before = {id(m) for t in inputs for m in tape.marks_of(t)}
        met = (m for t in outputs for m in tape.marks_of(t) if m.kind == "batch_norm" and id(m) not in before)
        mixed = {m.module: m for m in met}
        place = at(call.site, "torch.autograd.grad")
        if not mixed or place in self._told:
            return
        self._told.add(place)
        yield self.fault(
            f"the gradient with respect to a batch of inputs runs through BatchNorm in train mode: {listed(mixed)} "
            f"({next(iter(mixed.values())).name})",
            where=place,
            why="each output depends on every sample of the batch, so what is penalised is not the "
            "gradient of one sample",
            fix="use LayerNorm, GroupNorm or InstanceNorm there, or put the normalisation into eval mode "
            "for the penalty",
            names=tuple(mixed),
        )


def tensors_at(call: Call, position: int, name: str) -> list[Tensor]:
    """The tensors of one argument, given by position or by name."""
    value = call.args[position] if len(call.args) > position else call.kwargs.get(name, ())
    return [value] if isinstance(value, Tensor) else [t for t in value if isinstance(t, Tensor)]
