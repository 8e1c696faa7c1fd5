"""What a checkpoint runs a second time."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import FrameType

from torch.utils import checkpoint

from safeloop.autograd.recomputation import Difference
from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck, Check
from safeloop.checks.source import at
from safeloop.faults import Fault


class CheckpointRunsTwice(CallCheck):
    """Batch normalisation inside a checkpoint takes the same batch into its running statistics twice.

    ## What it does
    Tells where batch normalisation with running statistics runs in train mode inside of
    `torch.utils.checkpoint.checkpoint`, re-entrant or not. Cost: none beyond the tape of calls.

    ## Why it is bad
    The backward pass runs the checkpointed forward again, and with it the update of running_mean, running_var and
    num_batches_tracked. The statistics follow the last batches faster than `momentum` says, so that evaluation differs
    from a run without checkpoints; gradients are right.

    ## Bad
    ```python
    from torch.utils.checkpoint import checkpoint

    class Run(sl.Trainer):
        def loss(self, batch):
            return (checkpoint(self.model, batch, use_reentrant=False) - batch).square().mean()

    sgd = {"type": "SGD", "lr": 0.1}
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    Run(model=model, data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    from torch.utils.checkpoint import checkpoint

    class Run(sl.Trainer):
        def loss(self, batch):
            return (checkpoint(self.model, batch, use_reentrant=False) - batch).square().mean()

    sgd = {"type": "SGD", "lr": 0.1}
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    Run(model=model, data=[torch.randn(8, 4)], optimizers=sgd, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Leave the normalisation outside of the checkpoint, use GroupNorm or LayerNorm, or halve the effect by `momentum = 1
    - sqrt(1 - momentum)`.

    ## Source
    https://github.com/pytorch/pytorch/issues/96136.
    """

    code = "SL312"
    title = "statistics updated twice by a checkpoint"
    severity = "warning"
    hears = frozenset(("batch_norm",))

    def __init__(self) -> None:
        self._told: set[str] = set()

    def hear(self, call: Call) -> Iterator[Fault]:
        """Where batch normalisation trains inside `torch.utils.checkpoint.checkpoint`."""
        module = call.tape.module
        if module in self._told or not updates_statistics(call) or not _is_checkpointed(call.caller):
            return
        self._told.add(module)
        kind = type(call.tape.running).__name__ if call.tape.running is not None else "batch_norm"
        yield self.fault(
            f"`{module}` ({kind}, BatchNorm in train mode) runs inside a checkpoint: its running "
            "statistics take in every "
            "batch twice",
            where=f"module `{module}`; {at(call.site, 'its forward')}",
            why="the backward pass runs the checkpointed forward again, and with it the update of running_mean, "
            "running_var and num_batches_tracked",
            fix="leave the normalisation outside of the checkpoint, use GroupNorm or LayerNorm, or halve the effect by "
            "`momentum = 1 - sqrt(1 - momentum)`",
            names=(module,),
        )


class RecomputedOtherwise(Check):
    """A checkpoint computes other values in the backward pass than it did in the forward.

    ## What it does
    Reads a projection of every tensor that a region of `torch.utils.checkpoint.checkpoint` saves (not the re-entrant
    kind), and of the same tensor when the backward pass runs the region again. Differences of rounding, and buffers,
    are left alone. Cost: two reductions for each of these tensors, twice, on the steps that are looked at in depth.

    ## Why it is bad
    The backward pass takes the derivative of the second run, and the loss is that of the first: the gradient belongs to
    neither. torch compares shapes and dtypes alone.

    ## Bad
    ```python
    from torch.utils.checkpoint import checkpoint

    class Run(sl.Trainer):
        def loss(self, batch):
            return checkpoint(self.model, batch, use_reentrant=False, preserve_rng_state=False).square().mean()

    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1))
    Run(model=net, data=[torch.randn(8, 4)], optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    from torch.utils.checkpoint import checkpoint

    class Run(sl.Trainer):
        def loss(self, batch):
            return checkpoint(self.model, batch, use_reentrant=False).square().mean()

    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1))
    Run(model=net, data=[torch.randn(8, 4)], optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Leave `preserve_rng_state` at True. Draw random numbers, read counters and update states outside of the region, and
    hand them in as arguments. Switch modes after the backward pass.

    ## Source
    Documentation of `torch.utils.checkpoint`: "the recomputed values must be the same".
    """

    code = "SL316"
    title = "recomputation differs"

    @classmethod
    def find(cls, differences: Iterable[Difference], where: str = "") -> Iterator[Fault]:
        """A fault for each call of a checkpoint, from what a guard has seen in a backward pass."""
        for found in differences:
            made = at(found.made_at, "an unknown line")
            yield cls.fault(
                f"a checkpoint gave other values in the backward pass than in the forward, first in a tensor of shape "
                f"{list(found.shape)}",
                where="; ".join(filter(None, (at(found.called_at, "a checkpoint"), f"saved at {made}", where))),
                why="the gradient is that of the second run, and the loss that of the first; "
                + (_STATE if found.keeps_random_state else _RANDOM),
                fix="read and write states outside of the region, and hand them in as arguments"
                if found.keeps_random_state
                else "leave `preserve_rng_state` at True",
            )


_STATE = (
    "likely, in this order: the region writes a buffer or an attribute that it reads; a mode was switched or a value "
    "written in place before the backward pass; it draws random numbers of a generator of its own"
)
_RANDOM = "with preserve_rng_state=False dropout and other random numbers are drawn anew"


def updates_statistics(call: Call) -> bool:
    """Whether a call of `batch_norm` writes running statistics."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training")
    given = dict(zip(names, call.args, strict=False)) | dict(call.kwargs)
    return bool(given.get("training")) and given.get("running_mean") is not None


def _is_checkpointed(frame: FrameType | None) -> bool:
    frame = frame or sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == checkpoint.__file__:
            return True
        frame = frame.f_back
    return False
