"""Writes that torch's version counters do not see: to saved tensors, and to parameters that are read again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from safeloop.autograd.parameter_ledger import ParameterChange
from safeloop.autograd.saved_changes import SavedTensorChange
from safeloop.checks.check import Check
from safeloop.checks.graph.writers import joined, saved_at, saved_for, suspects, written_by
from safeloop.faults import Fault


class SavedTensorChangedUnseen(Check):
    """A tensor that the backward pass needs was changed after the forward had saved it, and torch saw nothing.

    ## What it does
    Takes a checksum of the bits of every tensor that autograd saves, and again when the backward pass uses it. Where
    they differ though no write was counted, or where the tensor's memory was replaced, it names the operation that
    had saved the tensor, the line, and the line that wrote it, or those that may have.

    ## Why it is bad
    The derivative of sigmoid, for one, is computed from its output. When that has been overwritten, the gradient is
    wrong. Writes through `.data`, numpy and DLPack, `leaf.data = new`, a loader that fills the same memory again and
    fused optimizers move no version counter: torch trains on without a word.

    ## Bad
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x):
            h = torch.sigmoid(self.fc(x))
            h.data.mul_(0.5)
            return self.out(h)

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    Run(model=Net(), data=[torch.randn(8, 4)], optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x):
            h = torch.sigmoid(self.fc(x))
            h = h * 0.5
            return self.out(h)

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    Run(model=Net(), data=[torch.randn(8, 4)], optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Write out of place: `h = h * 0.5` for `h.data.mul_(0.5)`. Clone a batch before writing into memory that it shares.
    Change weights after the backward pass or before the forward, under `with torch.no_grad():` and not through
    `.data`: torch then sees a write that comes at the wrong time.

    ## Source
    https://github.com/pytorch/pytorch/issues/6990; "In-place correctness checks" in torch's autograd notes.
    """

    code = "SL308"
    title = "saved tensor changed unseen"

    @classmethod
    def find(
        cls, changes: Iterable[SavedTensorChange], *, model: nn.Module, terms_source: str = "", where: str = ""
    ) -> Iterator[Fault]:
        """A fault for each memory that was written, from what a guard found in one backward pass.

        Args:
            changes: those of kind `version` are left out, as they end in an error of torch's: SL303.
            model: searched for lines and modules that write in place, where it is not known who did.
            terms_source: where the loss function is defined, searched likewise: `path:line in name`.
            where: the step, for a reader.
        """
        by_storage: dict[tuple[int, str], list[SavedTensorChange]] = {}
        for change in changes:
            if change.kind != "version":
                by_storage.setdefault((change.storage, change.parameter), []).append(change)
        for same in by_storage.values():
            yield cls._of(same, model, terms_source, where)

    @classmethod
    def _of(cls, same: Sequence[SavedTensorChange], model: nn.Module, terms_source: str, where: str) -> Fault:
        first = same[-1]  # the backward pass comes to the oldest last
        users = list(dict.fromkeys(saved_for(change) for change in reversed(same)))
        is_parameter = bool(first.parameter)
        known = written_by(first.written_by)
        return cls.fault(
            f"{_tensor(first)}, saved for {', '.join(users)}, {_changed(first)}",
            where=joined(saved_at(first), known or suspects(model, terms_source, unseen=True), where),
            why="the derivative is computed from what is in memory when the backward pass runs, so the gradient is "
            "wrong; `.data`, numpy, DLPack and fused optimizers write without counting",
            fix="change the parameter after the backward pass or before the forward, under `with torch.no_grad():`"
            if is_parameter
            else "write out of place (`h = h * 0.5` for `h.data.mul_(0.5)`), or clone before writing",
            names=(first.parameter,) if is_parameter else (),
        )


class ParameterChangedUnseen(Check):
    """A parameter was changed between the forward and the backward pass, where checkpointing reads it again.

    ## What it does
    Takes a checksum of every parameter when the forward ends, and again before the backward pass, of those that
    activation checkpointing will read a second time.

    ## Why it is bad
    `torch.utils.checkpoint` saves no activations: the backward pass runs that part of the forward again, with the
    parameters as they are then. The gradient is that of another function than the one whose loss was computed. torch
    compares shapes, no values, and no version counter is looked at, so that even a counted write goes unnoticed.

    ## Bad
    ```python
    from torch.utils.checkpoint import checkpoint

    class Run(sl.Trainer):
        def loss(self, batch):
            out = checkpoint(self.model, batch, use_reentrant=False)
            self.model[0].weight.data.clamp_(-0.1, 0.1)
            return out.square().mean()

    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    Run(model=net, data=[torch.randn(8, 4)], optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}).fit()
    ```
    ## Good
    ```python
    from torch.utils.checkpoint import checkpoint

    class Run(sl.Trainer):
        def loss(self, batch):
            with torch.no_grad():
                self.model[0].weight.clamp_(-0.1, 0.1)
            out = checkpoint(self.model, batch, use_reentrant=False)
            return out.square().mean()

    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    Run(model=net, data=[torch.randn(8, 4)], optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Change parameters before the forward or after the backward pass. Compute all gradients before any optimizer
    steps, or run the forward again after the step.

    ## Source
    Documentation of `torch.utils.checkpoint`: "the recomputed values must be the same".
    """

    code = "SL309"
    title = "parameter changed before its recomputation"

    @classmethod
    def find(
        cls, changes: Sequence[ParameterChange], *, model: nn.Module, terms_source: str = "", where: str = ""
    ) -> Iterator[Fault]:
        """One fault for all parameters that changed; arguments as for SL308."""
        if not changes:
            return
        shown = ", ".join(f"`{c.name}` {list(c.shape)} ({_KINDS[c.kind]})" for c in changes[:6])
        rest = f" and {len(changes) - 6} more" if len(changes) > 6 else ""
        known = written_by(tuple(dict.fromkeys(write for change in changes for write in change.written_by)))
        yield cls.fault(
            f"{shown}{rest} changed between the forward and the backward pass, which runs the forward of a "
            "checkpointed region again",
            where=joined(known or suspects(model, terms_source, unseen=True), where),
            why="the recomputation reads the changed parameters, so the gradient is that of another function than the "
            "one whose loss was computed",
            fix="change parameters before the forward or after the backward pass",
            names=tuple(change.name for change in changes),
        )


_KINDS = {
    "version": "written in place",
    "storage replaced": "its memory was replaced",
    "values": "values differ, no write was counted",
}


def _tensor(change: SavedTensorChange) -> str:
    shape, dtype = list(change.shape), str(change.dtype).removeprefix("torch.")
    return f"parameter `{change.parameter}`" if change.parameter else f"a tensor of shape {shape} ({dtype})"


def _changed(change: SavedTensorChange) -> str:
    if change.kind == "storage replaced":
        return "has got other memory since (`.data = ...`)"
    return "holds other values now, though torch's version counter saw no write"
