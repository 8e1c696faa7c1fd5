"""What a checkpoint runs a second time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

from torch.utils import checkpoint

from safeloop.autograd.tape import Call
from safeloop.checks.check import CallCheck
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
