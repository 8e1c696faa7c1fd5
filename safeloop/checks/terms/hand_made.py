"""Gradient penalties written by hand with `torch.autograd.grad`."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from safeloop.autograd.tape import Call, Mark
from safeloop.checks.check import CallCheck
from safeloop.checks.graph.recomputed import updates_statistics
from safeloop.checks.source import at
from safeloop.checks.wording import listed
from safeloop.faults import Fault

_SUMS = ["add", "__add__", "__radd__", "add_", "__iadd__", "sub", "__sub__", "__rsub__", "stack"]


class PenaltyWithoutGraph(CallCheck):
    """A gradient penalty is added to a loss, and was computed without create_graph.

    ## What it does
    Follows the results of `torch.autograd.grad(..., create_graph=False)` that a line of the user's called, and tells
    where a scalar made of them alone is added to a scalar that has a graph. Cost: none beyond the tape of calls.

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
    hears = frozenset(("grad", "detach", *_SUMS))

    def __init__(self) -> None:
        self._told: set[str] = set()

    def hear(self, call: Call) -> Iterator[Fault]:
        """Where a scalar that comes from `autograd.grad(create_graph=False)` alone is added to one with a graph."""
        if call.name == "grad":
            if not call.kwargs.get("create_graph") and call.caller is not None:
                for tensor in call.out if isinstance(call.out, tuple) else ():
                    if isinstance(tensor, Tensor):
                        call.tape.mark(tensor, Mark("gradient", "grad", "", call.site, call.tape.module, 0))
            return
        if call.name == "detach":
            if any(mark.kind == "gradient" for mark in call.tape.marks_of(call.args[0])):
                call.tape.mark(call.out, Mark("constant", "detach", "", call.site, call.tape.module, 0))
            return
        scalars = [t for t in call.tensors if not t.dim()]
        if len(scalars) < 2 or not any(t.requires_grad for t in scalars):
            return
        for tensor in scalars:
            marks = {m.kind: m for m in reversed(list(call.tape.marks_of(tensor)))}
            mark = marks.get("gradient")
            if tensor.requires_grad or mark is None or "constant" in marks:
                continue
            place = at(mark.site, "torch.autograd.grad")
            if place not in self._told:
                self._told.add(place)
                yield self.fault(
                    "a penalty computed from torch.autograd.grad(..., create_graph=False) is added "
                    "to the loss: it is a "
                    f"constant there, value {float(tensor):.4g}",
                    where=f"{place}; added at {at(call.site, 'the loss')}",
                    why="without create_graph=True the gradients have no history: the penalty is part of "
                    "the loss that is "
                    "logged, and trains nothing",
                    fix="pass create_graph=True to torch.autograd.grad, or let a Trainer do it by `self.penalty(...)`",
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
        outputs, inputs = _tensors(call, 0, "outputs"), _tensors(call, 1, "inputs")
        if not any(t.dim() > 1 and len(t) > 1 and not tape.live(t) for t in inputs):
            return
        mixed = {m.module: m for t in outputs for m in tape.marks_of(t) if m.kind == "batch_norm"}
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


def _tensors(call: Call, position: int, name: str) -> list[Tensor]:
    value = call.args[position] if len(call.args) > position else call.kwargs.get(name, ())
    return [value] if isinstance(value, Tensor) else [t for t in value if isinstance(t, Tensor)]


class PartOfSumWithoutGradient(CallCheck):
    """A part of a loss was computed with grad mode off, and is added to a part that has a gradient.

    ## What it does
    Hears sums of two scalars on the steps that are looked at in depth: one has a graph; the other has none, and its
    value was computed from parameters under `no_grad` or inference mode.

    ## Why it is bad
    The part is in the loss that is logged and trains nothing. Where the same parameters are reached by the other part,
    no gradient is missing, so that nothing else shows it.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            fit = self.model(batch).square().mean()
            with torch.no_grad():
                decay = self.model.weight.square().sum()
            return fit + decay

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 4), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            fit = self.model(batch).square().mean()
            decay = self.model.weight.square().sum()
            return fit + decay

    sgd = {"type": "SGD", "lr": 0.1}
    Run(model=nn.Linear(4, 4), data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Compute the part with grad mode on. What is only to be looked at belongs in `metrics`, or in the log beside the
    loss; write `.detach()` where a constant is meant, which says so.

    ## Source
    Documentation of `torch.no_grad`.
    """

    code = "SL425"
    title = "part of a sum without gradient"
    severity = "warning"
    hears = frozenset(("add", "__add__", "__radd__", "add_", "__iadd__", "sub", "__sub__"))

    def __init__(self) -> None:
        self._told: set[str] = set()

    def hear(self, call: Call) -> Iterator[Fault]:
        """Where a scalar that was computed from parameters under no_grad is added to one with a graph."""
        scalars = [t for t in call.tensors if not t.dim()]
        if len(scalars) < 2 or not any(t.requires_grad and call.tape.live(t) for t in scalars):
            return
        for tensor in scalars:
            cuts = [m for m in call.tape.marks_of(tensor) if m.kind == "cut"]
            if tensor.requires_grad or not cuts or not all(m.reason.startswith(_OFF) for m in cuts):
                continue
            place = at(cuts[0].site, "a line under no_grad")
            if place in self._told:
                continue
            self._told.add(place)
            names = call.tape.names_of(cuts[0].live)
            yield self.fault(
                f"a part of the loss that was computed from {listed(names)} has no graph, value {float(tensor):.4g}: "
                "it is a constant there",
                where=f"{place}; added at {at(call.site, 'the loss')}",
                why=f"{cuts[0].reason}: its contribution to their gradient is missing",
                fix="compute it with grad mode on, or leave it out of the loss; write `.detach()` where a constant is "
                "meant",
                names=names,
            )


_OFF = ("no_grad", "inference mode")
