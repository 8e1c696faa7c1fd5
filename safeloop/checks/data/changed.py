"""Data that is changed in place each time it comes again."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from safeloop.autograd.sites import Site
from safeloop.autograd.tape import Call
from safeloop.autograd.writes import storage_pointer
from safeloop.checks.check import CallCheck
from safeloop.checks.source import at
from safeloop.checks.wording import counted
from safeloop.faults import Fault

_SCALES = frozenset(("mul_", "div_", "__imul__", "__itruediv__", "multiply_", "divide_", "true_divide_"))
_SHIFTS = frozenset(("add_", "sub_", "__iadd__", "__isub__", "subtract_"))
_CLAMPS = frozenset(("clamp_", "clip_"))
_DIFFERENCES = frozenset(("sub", "__sub__", "rsub", "__rsub__"))
"""What is differentiated is compared with a target so, in a loss that is written by hand."""
_INPUTS = frozenset(
    (
        *("conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear", "matmul", "__matmul__", "lstm", "gru", "bmm"),
        *("batch_norm", "layer_norm", "embedding", "cross_entropy", "nll_loss"),
        *("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"),
    )
)
"""Where data goes into a model or a loss."""
_ONE_ALONE = 3
"""So often must a tensor come again that is the only one, of several operations"""
_MOST = 10**6
"""Elements of a sample that are kept."""
_SHORT = 64
"""Elements of a tensor of one dimension that are kept"""
_CONSTANT = 4096
"""Elements of a mean or a scale that are compared"""


class _Visit:
    """What one line has done to a tensor in one step."""

    def __init__(self, tensor: Tensor, site: Site | None, step: int) -> None:
        self.tensor = weakref.ref(tensor)
        self.site, self.step = site, step
        self.operations: list[tuple[str, Any, Any]] = []
        self.is_used = False
        self.sample: Tensor | None = None
        self.version = -1
        self.times = 1
        """steps so far in which the same was done to what the one before had left"""


class DataChangedInPlace(CallCheck):
    """A batch is scaled or shifted in place, and comes again in the next epoch as it was left.

    ## What it does
    Notes lines that multiply, divide or shift a tensor in place by constants, where the tensor then goes into a layer
    or a loss, or what is differentiated is compared with it. Speaks where the same tensor comes again in a later step
    with the very values that the step before had left, and the same is done to it again: for two tensors or more, or
    three times to one that is scaled and shifted. Batches that are collated afresh, buffers that are filled again, and
    parameters are left alone. Cost: a copy of one sample of each such tensor, on steps that are looked at in depth.

    ## Why it is bad
    `x.div_(255)` writes into the memory of the data set. In each epoch the data is divided once more, until all of it
    is a constant: the model is trained on other data than it is used on.

    ## Bad
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch.div_(255).sub_(0.5)).square().mean()

    data = [255 * torch.rand(8, 4) for _ in range(3)] * 3
    Run(model=nn.Linear(4, 1), data=data, optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 9}).fit()
    ```
    ## Good
    ```python
    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch / 255 - 0.5).square().mean()

    data = [255 * torch.rand(8, 4) for _ in range(3)] * 3
    Run(model=nn.Linear(4, 1), data=data, optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 9}).fit()
    ```
    ## Fix
    Use the operation that makes a new tensor (`x / 255 - 0.5`), or scale the data set once, before the loop.

    ## Source
    safeloop's own rule; https://docs.pytorch.org/docs/stable/notes/autograd.html#in-place-operations-with-autograd.
    """

    code = "SL866"
    title = "data changed in place again and again"
    hears = _SCALES | _SHIFTS | _CLAMPS | _INPUTS | _DIFFERENCES

    def __init__(self) -> None:
        self._now = -1
        self._open: dict[int, _Visit] = {}
        """storage -> what this step has done to it"""
        self._kept: dict[int, _Visit] = {}
        """storage -> what the last step that had it has left"""
        self._again: dict[Site | None, dict[int, _Visit]] = {}
        """line -> the tensors that came again, after others or several times in a row"""
        self._steps: dict[Site | None, tuple[int, int]] = {}
        """line -> the last two steps that ran it"""
        self._told: set[Site | None] = set()

    def hear(self, call: Call) -> Iterator[Fault]:
        """At data that comes again as it was left, where it goes into the model."""
        if not call.tensors:
            return
        if call.name in _INPUTS or call.name in _DIFFERENCES:
            if self._open and (call.name in _INPUTS or (isinstance(call.out, Tensor) and call.out.requires_grad)):
                for tensor in call.tensors:
                    yield from self._used(tensor, call.tape.first_node)
            return
        tensor = call.tensors[0]
        is_data = tensor.is_leaf and not tensor.requires_grad and tensor.dim() and not tensor.is_inference()
        if call.is_direct and is_data and call.args and call.args[0] is tensor:
            self._written(tensor, call)

    def _written(self, tensor: Tensor, call: Call) -> None:
        pointer, step = storage_pointer(tensor), call.tape.first_node
        visit = self._open.get(pointer)
        if visit is None or visit.step != step:
            self._begin(step, call.site)
            visit = self._open[pointer] = _Visit(tensor, call.site, step)
            if not _is_as_left(self._kept.get(pointer), tensor):
                self._kept.pop(pointer, None)
        visit.operations.append((call.name, _operand(call), call.site))

    def _begin(self, step: int, site: Site | None) -> None:
        before = self._steps.get(site, (-1, -1))[1]
        if before != step:
            self._steps[site] = before, step
        if self._now != step:
            self._now = step
            self._open.clear()
            self._kept = {key: visit for key, visit in self._kept.items() if visit.tensor() is not None}

    def _used(self, tensor: Tensor, step: int) -> Iterator[Fault]:
        pointer = storage_pointer(tensor)
        visit = self._open.get(pointer)
        if visit is None or visit.step != step or visit.is_used:
            return
        visit.is_used = True
        written = visit.tensor()
        if written is None or any(other is None for _, other, _ in visit.operations):
            return
        before = self._kept.get(pointer)
        if before is not None and before.tensor() is written and _is_repeated(before, visit):
            visit.times = before.times + 1
            yield from self._settle(visit, pointer, was_away=self._steps[visit.site][0] != before.step)
        visit.sample, visit.version = _sample(written), written._version
        self._kept[pointer] = visit

    def _settle(self, visit: _Visit, pointer: int, *, was_away: bool) -> Iterator[Fault]:
        again = self._again.setdefault(visit.site, {})
        names = {name for name, _, _ in visit.operations}
        is_both = bool(names & _SCALES and names & _SHIFTS)
        if was_away or (is_both and visit.times >= _ONE_ALONE):
            again[pointer] = visit
        is_sure = len(again) > 1 or (bool(again) and not was_away)
        tensor = visit.tensor()
        if not is_sure or visit.site in self._told or tensor is None:
            return
        self._told.add(visit.site)
        calls = ", ".join(f"`{name}`" for name in dict.fromkeys(name for name, _, _ in visit.operations))
        yield self.fault(
            f"{calls} changes data in place that comes again: {counted(len(again), 'tensor')} of shape "
            f"{tuple(tensor.shape)} came back as the step before had left {'it' if len(again) == 1 else 'them'}, and "
            "the same was done once more",
            where=at(visit.site, "the operation"),
            why="an operation in place writes into the memory that the data set keeps: in each epoch the data is "
            "changed once more",
            fix="use the operation that makes a new tensor (`x / 255 - 0.5`), or scale the data set once, before the "
            "loop",
            names=tuple(names),
        )


def _operand(call: Call) -> Any:
    """What a tensor is multiplied with or shifted by, or its bounds; None where that is no constant."""
    if call.name in _CLAMPS:
        bounds = [*call.args[1:], *call.kwargs.values()]
        names = ["min", "max"][: len(call.args) - 1] + list(call.kwargs)
        is_plain = all(bound is None or isinstance(bound, (int, float)) for bound in bounds)
        return dict(zip(names, bounds, strict=True)) if is_plain else None
    return _constant(call.args[1]) if len(call.args) == 2 and not call.kwargs else None


def _constant(other: Any) -> Any:
    """A number, or the values of a small tensor; None for what is no constant."""
    if isinstance(other, (int, float)):
        return other
    if isinstance(other, Tensor) and other.numel() <= _CONSTANT and not other.requires_grad and not other.is_sparse:
        return other.detach().clone()
    return None


def _is_repeated(one: _Visit, other: _Visit) -> bool:
    """Whether the same lines have done the same with the same constants, and what they did changes values."""
    if len(one.operations) != len(other.operations) or one.step == other.step or one.sample is None:
        return False
    pairs = list(zip(one.operations, other.operations, strict=True))
    if any(a[0] != b[0] or a[2] != b[2] or not _is_equal(a[1], b[1]) for a, b in pairs):
        return False
    tensor = other.tensor()
    if tensor is None or not tensor.shape[0] or any(_differs_by_row(c, tensor) for _, c, _ in other.operations):
        return False
    expected, now = one.sample.clone(), _first(tensor)
    for name, constant, _ in other.operations:
        expected = expected.clamp_(**constant) if name in _CLAMPS else getattr(expected, name)(constant)
    return torch.allclose(expected, now, equal_nan=True) and not torch.equal(now, one.sample)


def _is_as_left(before: _Visit | None, tensor: Tensor) -> bool:
    """Whether nobody has written since, other than the operation that has just run."""
    return before is not None and before.tensor() is tensor and tensor._version == before.version + 1


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and bool(one == other)


def _differs_by_row(constant: Any, tensor: Tensor) -> bool:
    return isinstance(constant, Tensor) and constant.dim() == tensor.dim() and constant.shape[0] != 1


def _sample(tensor: Tensor) -> Tensor | None:
    first = _first(tensor)
    return first.clone() if first.numel() <= _MOST else None


def _first(tensor: Tensor) -> Tensor:
    """The first sample of a batch, or the first ones of numbers."""
    return tensor[: 1 if tensor.dim() > 1 else _SHORT].detach()
