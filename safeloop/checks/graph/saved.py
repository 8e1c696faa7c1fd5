"""Tensors that the backward pass needs and that were overwritten after the forward had saved them."""

from __future__ import annotations

import re

from safeloop.checks.check import Check
from safeloop.checks.graph.scene import Scene
from safeloop.checks.graph.writers import joined, saved_at, saved_for, suspects, written_by
from safeloop.faults import Fault

_SAVED = re.compile(
    r"modified by an inplace operation: \[(?P<type>[\w.]+) \[(?P<shape>[\d, ]*)\]\]"
    r"(?:, which is output (?P<output>\d+) of (?P<op>\w+),)?"
    r" is at version (?P<found>\d+); expected version (?P<saved>\d+)"
)


class SavedTensorChanged(Check):
    """A tensor that the backward pass needs was changed in place after the forward had saved it.

    ## What it does
    Recognises torch's error "modified by an inplace operation": says which operation had saved the tensor, its shape
    and how often it was written, and lists the lines and modules that write in place.

    ## Why it is bad
    The derivative of sigmoid, for one, is computed from its output. When that has been overwritten, the gradient is
    wrong. torch notices by a version counter, but only at the backward pass, without the line. Writes through `.data`
    or numpy are not counted: SL308.

    ## Bad
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x):
            h = torch.sigmoid(self.fc(x))
            h += x
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
            h = h + x
            return self.out(h)

    class Run(sl.Trainer):
        def loss(self, batch):
            return self.model(batch).square().mean()

    Run(model=Net(), data=[torch.randn(8, 4)], optimizers={"type": "SGD", "lr": 0.1}, run={"max_steps": 1}).fit()
    ```
    ## Fix
    Write out of place: `h = h + x` for `h += x`, `x.sub(y)` for `x.sub_(y)`, `inplace=False` for one of two adjacent
    modules. Clone a batch before changing it.

    ## Source
    https://github.com/lyongo/NWPU-MOC/issues/4; "In-place correctness checks" in torch's autograd notes.
    """

    code = "SL303"
    title = "saved tensor changed in place"

    @classmethod
    def of(cls, scene: Scene) -> Fault:
        """The fault for an error raised by a backward pass."""
        match = _SAVED.search(scene.message)
        users = f", saved for {saved_for(scene.change)}" if scene.change is not None else ""
        parameter = scene.change.parameter if scene.change is not None else ""
        written = written_by(scene.change.written_by) if scene.change is not None else ""
        return cls.fault(
            _saved(match, parameter, is_known=scene.change is not None) + users,
            where=joined(saved_at(scene.change), scene.where, written or suspects(scene.model, scene.terms_source)),
            why="the derivative is computed from the value that was saved"
            + ("" if written else "; which of the lines wrote it, torch does not say"),
            fix="change the parameter after the backward pass, or before the forward"
            if parameter
            else "write out of place (`h = h + x` for `h += x`, `x.sub(y)` for `x.sub_(y)`, `inplace=False`), or "
            "clone before writing",
            names=(parameter,) if parameter else (),
        )


def _saved(match: re.Match[str] | None, parameter: str, *, is_known: bool) -> str:
    if match is None:
        return "a tensor that the backward pass needs was changed in place after it was saved"
    unmade = "" if is_known else " (not the result of an operation)"
    maker = f" (output {match['output']} of `{match['op']}`)" if match["op"] else unmade
    tensor = f"parameter `{parameter}`, as a tensor" if parameter else "a tensor"
    versions = f"version {match['found']}, saved at {match['saved']}"
    return f"{tensor} of shape [{match['shape']}]{maker} was changed in place after it was saved: {versions}"
